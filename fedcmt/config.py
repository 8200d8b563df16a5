"""Every setting and its default. YAML in, resolved YAML out; an unknown key is an error that names the nearest one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedcmt.errors import InputError
from fedcmt.membership import Membership
from fedcmt.overrides import apply_override
from fedcmt.settings import Count, Depth, Extent, Kernel, Name, Settings, Spacing, Strides, Width, validated


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads off as false


class TopologyConfig(Settings):
    """The network all clients share. Axes are in each client's plan order: the axis of lowest resolution first."""

    auto: bool = Field(
        False, description="choose stages, strides and kernels from the clients' merged shapes and spacings"
    )
    encoder: Literal["plain", "residual"] = "plain"
    features: list[Width] = Field([32, 64, 128, 256, 320], min_length=3, max_length=8)
    strides: list[Strides] | None = Field(None, description="one [d, h, w] a stage; default 1 in the first, then 2")
    kernel_sizes: list[Kernel] | None = Field(None, description="one [d, h, w] a stage, odd; default 3")
    convs_per_stage: Depth | list[Depth] = Field(2, description="of the plain encoder; one number or one a stage")
    blocks_per_stage: Depth | list[Depth] | None = Field(
        None, description="of the residual encoder; default nnU-Net's 1, 3, 4, 6, 6, ..."
    )
    decoder_convs_per_stage: int = Field(1, ge=1, le=16)
    adaptor_width: Width = Field(32, description="channels between adaptor and encoder")
    norm: Literal["instance", "batch"] = "instance"

    @model_validator(mode="before")
    @classmethod
    def _auto_by_name(cls, data: Any) -> Any:
        return {"auto": True} if data == "auto" else data

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> TopologyConfig:
        if self.auto and (self.strides or self.kernel_sizes):
            raise ValueError("strides and kernel_sizes should be left out with auto, which chooses them")
        if self.encoder == "plain" and self.blocks_per_stage is not None:
            raise ValueError("blocks_per_stage should be left out unless encoder is residual")
        if self.encoder == "residual" and self.convs_per_stage != 2:
            raise ValueError("convs_per_stage should be left out unless encoder is plain; use blocks_per_stage")
        return self

    @model_validator(mode="after")
    def _one_entry_a_stage(self) -> TopologyConfig:
        for name in ("strides", "kernel_sizes", "convs_per_stage", "blocks_per_stage"):
            value = getattr(self, name)
            if not self.auto and isinstance(value, list) and len(value) != len(self.features):
                raise ValueError(f"{name} should have one entry per stage ({len(self.features)}), found {len(value)}")
        if any(size % 2 == 0 for sizes in self.kernel_sizes or [] for size in sizes):
            raise ValueError("kernel_sizes should be odd")
        if self.strides and self.strides[0] != [1, 1, 1]:
            raise ValueError(f"strides should begin with [1, 1, 1], found {self.strides[0]}")
        return self


class TrainingConfig(Settings):
    """Local training of a client between two exchanges."""

    local_steps: Count = 250
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0, le=10)
    learning_rate_schedule: Literal["constant", "poly"] = Field(
        "poly", description="by round: constant, or nnU-Net's (1 - round / rounds)^0.9"
    )
    weight_decay: float = Field(1e-5, ge=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd (Nesterov)")
    clip_norm: float = Field(1.0, gt=0, description="largest Euclidean norm of a gradient")
    optimizer_state: Literal["keep", "reset"] = Field("keep", description="across rounds")
    mixed_precision: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = Field(
        "auto", description="auto: bfloat16 on GPUs and on CPUs with AMX"
    )
    deep_supervision: bool = True
    oversample_foreground: float = Field(0.33, ge=0, le=1)
    validation_batches: Count = Field(8, description="patches for the score after each round, the same every round")


class DataConfig(Settings):
    """How training and validation patches are made; none of it but the backend changes a voxel."""

    backend: Literal["auto", "dali", "torch"] = Field("auto", description="auto: torch on CPUs, DALI on GPUs")
    threads: Width | None = Field(None, description="that make patches; default 1 on CPUs, 4 on GPUs")
    ahead: int = Field(2, ge=1, le=64, description="batches made before they are needed; bounds the memory")
    timeout: float = Field(120.0, gt=0, description="seconds after which reading a batch counts as hanging")


Checkpoint = Literal["best", "last"]


class InferenceConfig(Settings):
    """Sliding-window prediction."""

    tile_step_size: float = Field(0.5, gt=0, le=1, description="distance of tiles in patches")
    mirroring: bool = True
    checkpoint: Checkpoint = Field(
        "last", description="model that is scored, exported and used: after the last round, or best on held-out cases"
    )


class FilterConfig(BaseModel):
    """An NVFlare privacy filter by name; its own settings are checked where it is made."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Literal["percentile", "svt", "exclude"]

    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class NvflareConfig(Settings):
    """Running on NVFlare."""

    wire_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of parameters and updates under way")
    min_clients: Count | None = Field(
        None, description="updates without which a round is not finished; default: of more than half of its members"
    )
    round_timeout: float = Field(
        3600, ge=1, le=10_000_000, description="seconds that a client has for training, and again for validation"
    )
    preparation_timeout: float = Field(
        86_400, ge=1, le=10_000_000, description="seconds that a client has for planning and preprocessing"
    )
    start_timeout: float = Field(
        600, ge=1, le=10_000_000, description="seconds that the server waits for clients to connect and prepare"
    )
    filters: list[FilterConfig] = Field([], description="privacy filters on every update, before it leaves the client")
    quantizer: Literal["none", "float16", "adaquant"] = Field("none", description="of updates under way")

    @model_validator(mode="after")
    def _one_way_to_shorten(self) -> NvflareConfig:
        if self.quantizer != "none" and self.wire_dtype != "float32":
            raise ValueError("quantizer should be none with a wire_dtype other than float32")
        return self


class ClientConfig(Settings):
    """One site."""

    name: Name
    dataset: int | str = Field(description="number or full name of an nnU-Net raw dataset, 901 or Dataset901_Chest")
    modality: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,16}$")] = Field(description="CT, MR, PET, ...")
    task: Literal["segmentation", "classification"] | None = Field(None, description="default: what the dataset holds")
    configuration: Literal["3d_fullres", "2d"] | None = Field(
        None, description="nnU-Net's; default 3d_fullres, and 2d for datasets of single slices"
    )
    channels: Width | None = Field(None, description="number of input channels; checked when given")
    spacing: Spacing | None = Field(
        None, description="target voxel spacing in mm, in the order of the stored array (z, y, x); default: nnU-Net's"
    )
    patch_size: Extent | None = Field(None, description="voxels in plan order; default: nnU-Net's, segmentation only")
    batch_size: Width | None = None
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    local_steps: Count | None = Field(None, description="instead of training.local_steps")
    initial_weights: Path | None = Field(None, description="checkpoint that the client's own decoder starts from")
    target: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="what is predicted; clients of equal task and target are alike; default: the names of labels"
    )
    joins_at_round: Count = Field(1, description="first round it takes part in")
    leaves_after_round: Count | None = Field(None, description="last round it takes part in; default: it stays")
    warmup_rounds: int = Field(
        0, ge=0, le=1_000_000, description="first rounds that train its own parts only, without counting"
    )
    starting_adaptor: Literal["nearest", "fresh"] = Field(
        "nearest", description="of a client that joins later and is the first of its group"
    )

    @model_validator(mode="after")
    def _leaves_after_joining(self) -> ClientConfig:
        if self.leaves_after_round is not None and self.leaves_after_round < self.joins_at_round:
            raise ValueError(
                f"leaves_after_round should be at least joins_at_round ({self.joins_at_round}), "
                f"found {self.leaves_after_round}"
            )
        return self

    @property
    def membership(self) -> Membership:
        """When it belongs to the federation."""
        return Membership(self.joins_at_round, self.leaves_after_round, self.warmup_rounds, self.starting_adaptor)


class StrategyConfig(BaseModel):
    """A strategy's name; its own settings are checked by the strategy itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "fedcmt"

    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class FederationConfig(Settings):
    """A whole federation. Relative paths start at the current directory."""

    name: Name
    clients: list[ClientConfig] = Field(min_length=1)
    rounds: Count = 100
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Width | None = Field(None, description="CPU threads; default: torch's choice")
    backend: Literal["auto", "native", "reference"] = Field("auto", description="of fedcmt.ops")
    raw: Path | None = Field(None, description="default: the environment variable nnUNet_raw")
    preprocessed: Path | None = Field(None, description="default: the environment variable nnUNet_preprocessed")
    workspace: Path | None = Field(None, description="default: workspace/<name>")
    preprocessing_workers: int = Field(2, ge=1, le=256)
    initial_weights: Path | None = Field(None, description="checkpoint that the encoder and adaptors start from")
    quarantine_ratio: float | None = Field(
        1000, gt=1, description="an update so many times larger than the others' median is not used; null: no limit"
    )
    strategy: StrategyConfig = StrategyConfig()
    topology: TopologyConfig = TopologyConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    inference: InferenceConfig = InferenceConfig()
    nvflare: NvflareConfig = NvflareConfig()

    @model_validator(mode="before")
    @classmethod
    def _strategy_by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("strategy"), str):
            return {**data, "strategy": {"name": data["strategy"]}}
        return data

    @model_validator(mode="after")
    def _distinct_clients(self) -> FederationConfig:
        names = [client.name.lower() for client in self.clients]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"clients should have distinct names, found '{twice[0]}' more than once")
        return self

    @model_validator(mode="after")
    def _quorum_can_be_met(self) -> FederationConfig:
        if self.nvflare.min_clients is not None and self.nvflare.min_clients > len(self.clients):
            raise ValueError(
                f"nvflare.min_clients should be at most the number of clients ({len(self.clients)}), "
                f"found {self.nvflare.min_clients}"
            )
        return self

    @model_validator(mode="after")
    def _somebody_in_every_round(self) -> FederationConfig:
        # The number of members changes after these rounds only.
        leaving = {client.leaves_after_round for client in self.clients} - {None}
        for round_index in sorted({1} | {last + 1 for last in leaving if last is not None and last < self.rounds}):
            if not self.members(round_index):
                raise ValueError(f"clients should take part in every round, found none in round {round_index}")
        return self

    def members(self, round_index: int) -> set[str]:
        """Names of the clients that take part in a round."""
        return {client.name for client in self.clients if client.membership.takes_part(round_index)}

    def quorum(self, round_index: int) -> int:
        """Updates without which a round on NVFlare is not finished: as set, else of more than half of its members."""
        members = len(self.members(round_index))
        return min(self.nvflare.min_clients or members // 2 + 1, members)

    def with_patches_by(self, backend: Literal["dali", "torch"]) -> FederationConfig:
        """The same with a backend of patches that is chosen."""
        return self.model_copy(update={"data": self.data.model_copy(update={"backend": backend})})

    def folder(self, which: Literal["raw", "preprocessed"]) -> Path:
        """nnU-Net's raw or preprocessed folder, from the config or the environment.

        Raises:
            InputError: Neither is set.
        """
        configured = getattr(self, which) or os.environ.get(f"nnUNet_{which}")
        if not configured:
            raise InputError(
                f"no folder of {which} datasets",
                field=which,
                fix=f"set '{which}' in the config or the environment variable nnUNet_{which}",
            )
        return Path(configured)

    def workspace_folder(self) -> Path:
        """Where the run writes."""
        return self.workspace or Path("workspace") / self.name


def load_config(
    source: Path | str | Mapping[str, Any] | FederationConfig, overrides: Sequence[str] = ()
) -> FederationConfig:
    """Read a federation's configuration.

    Args:
        source: YAML file, mapping or finished config.
        overrides: ``key.path=value`` each, the value in YAML; a list entry is named by its number or, for clients, by
            its name: ``clients.ct_a.local_steps=10``; ``clients.*`` means every client.

    Raises:
        InputError: The file cannot be read or a setting is wrong.
    """
    if isinstance(source, FederationConfig):
        source = source.model_dump(mode="json", exclude_unset=True)
    data = deepcopy(dict(source)) if isinstance(source, Mapping) else _read_yaml(Path(source))
    for override in overrides:
        apply_override(data, override)
    return validated(FederationConfig, data)


def dump_config(config: FederationConfig) -> str:
    """The resolved configuration as YAML: every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read config file {path}: {error.strerror}", field="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}", field="config") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} should hold a mapping of settings, found {type(data).__name__}", field="config")
    return data
