"""A client's side of a job on NVFlare: hands messages to the trainer's process and carries its answers back."""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedcmt.checkpoint import Workspace
from fedcmt.engines.messages import Failed, Message, MessageError, Prepare
from fedcmt.engines.nvflare_settings import settings_of
from fedcmt.engines.nvflare_tensors import register
from fedcmt.engines.nvflare_wire import TASK, from_wire, to_shareable
from fedcmt.engines.site_process import Cancelled, TrainerDied, TrainerProcess
from fedcmt.errors import InputError


class FedCMTExecutor(Executor):
    """Relays. The trainer is a process of its own: were it this one, its death would end the job for everybody."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer: TrainerProcess | None = None
        self._prepare: Message | None = None  # said again to a new trainer

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Called by NVFlare."""
        if event_type == EventType.START_RUN:
            register()
        elif event_type in (EventType.END_RUN, EventType.ABORT_TASK) and self._trainer is not None:
            self._end()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Called by NVFlare with a message of the server's."""
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        try:
            answer = self._relay(from_wire(shareable), fl_ctx, abort_signal)
        except MessageError as error:
            answer = Message(Failed(reason=f"refused: {error}"[:2000]))
        except InputError as error:
            answer = Message(Failed(reason=str(error)[:2000], mistake=True))
        except TrainerDied as error:
            self._trainer = None
            self.log_error(fl_ctx, str(error))
            answer = Message(Failed(reason=str(error)))
        except Cancelled:
            self._trainer = None
            return make_reply(ReturnCode.TASK_ABORTED)
        return to_shareable(answer)

    def _relay(self, message: Message, fl_ctx: FLContext, abort_signal: Signal) -> Message:
        def cancelled() -> bool:
            return bool(abort_signal.triggered)

        if self._trainer is None:
            self._trainer = self._start(fl_ctx)
            if self._prepare is not None and not isinstance(message.body, Prepare):
                prepared = self._trainer.ask(self._prepare, cancelled)
                if isinstance(prepared.body, Failed):
                    return prepared
        if isinstance(message.body, Prepare):
            self._prepare = message
        return self._trainer.ask(message, cancelled)

    def _start(self, fl_ctx: FLContext) -> TrainerProcess:
        name = fl_ctx.get_identity_name()
        config, shares = settings_of(fl_ctx, name)
        folder = Workspace(config.workspace_folder()).client(name).path
        return TrainerProcess(config, name, shares=shares, log=Path(folder) / "trainer.log")

    def _end(self) -> None:
        if self._trainer is not None:
            self._trainer.end()
            self._trainer = None
