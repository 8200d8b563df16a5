"""The server's side of a job on NVFlare."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from nvflare.apis.client import Client as NvflareClient
from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedcmt.checkpoint import Workspace
from fedcmt.engines.coordinator import Coordinator
from fedcmt.engines.messages import Message, MessageError
from fedcmt.engines.nvflare_settings import settings_of
from fedcmt.engines.nvflare_tensors import register
from fedcmt.engines.nvflare_wire import TASK, from_wire, to_shareable
from fedcmt.errors import InputError

STATUS, STOP = "fedcmt.status", "fedcmt.stop"  # commands that an administrator can send to a running job
_LOOK_AGAIN = 0.02  # seconds


class FedCMTController(Controller):
    """Runs a :class:`fedcmt.engines.coordinator.Coordinator` and carries its messages."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.1)
        self._coordinator: Coordinator | None = None
        self._context: FLContext | None = None
        self._abort: Signal | None = None
        self._one_at_a_time = threading.Lock()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Called by NVFlare before the job's first task."""
        register()

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Called by NVFlare after the job; everything is on disk by then."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Called by NVFlare: the job."""
        self._context, self._abort = fl_ctx, abort_signal
        try:
            config, shares = settings_of(fl_ctx, None)
            log = _Log(Workspace(config.workspace_folder()))
            self._coordinator = Coordinator(
                config, self, lambda text: self._note(log, text), one_machine=shares == "files"
            )
        except InputError as error:
            self.system_panic(str(error), fl_ctx)
            return
        self._engine.register_app_command(STATUS, self._tell_status)
        self._engine.register_app_command(STOP, self._take_stop)
        state = self._coordinator.run()
        if state == "failed":
            self.system_panic(str(self._coordinator.status.get("reason")), fl_ctx)

    def _note(self, log: _Log, text: str) -> None:
        self.log_info(self._context, text)
        log.add(text)

    def _tell_status(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        return dict(self._coordinator.status) if self._coordinator else {"state": "running"}

    def _take_stop(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        if self._coordinator is not None:
            self._coordinator.stop_after_round()
        return self._tell_status(topic, data, fl_ctx)

    def expected(self) -> Sequence[str]:
        """Clients to which NVFlare deployed this job."""
        meta = self._context.get_prop(FLContextKey.JOB_META) if self._context else None
        clients = meta.get(JobMetaKey.JOB_CLIENTS) if isinstance(meta, dict) else None
        return [str(client["name"]) for client in clients] if clients else self.connected()

    def connected(self) -> Sequence[str]:
        """Clients of this job that have not been reported dead."""
        return [c.name for c in self._engine.get_clients() if not self.get_client_disconnect_time(c.name)]

    def ended(self) -> bool:
        """Whether NVFlare ends the job."""
        return self._abort is not None and bool(self._abort.triggered)

    def ask(
        self, requests: Mapping[str, Message], *, timeout: float, on_answer: Callable[[str, Message], None]
    ) -> Mapping[str, str]:
        """See :meth:`fedcmt.engines.enrolment.Carrier.ask`."""
        missing: dict[str, str] = {}

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            name, result = client_task.client.name, client_task.result
            client_task.result = None  # NVFlare would keep it until the task is forgotten
            with self._one_at_a_time:
                try:
                    on_answer(name, _message(result))
                except MessageError as error:
                    missing[name] = f"refused: {error}"

        tasks = {
            name: Task(TASK, to_shareable(message), timeout=max(1, round(timeout)), result_received_cb=received)
            for name, message in requests.items()
        }
        for name, task in tasks.items():
            self.send(task, self._context, targets=[name])
        while any(task.completion_status is None for task in tasks.values()):
            if self.ended():
                self.cancel_all_tasks(fl_ctx=self._context)
                break
            time.sleep(_LOOK_AGAIN)
        for name, task in tasks.items():
            task.data = Shareable()  # lets go of the parameters that were sent
            if task.completion_status != TaskCompletionStatus.OK:
                missing[name] = _why(task, timeout)
        return missing

    def process_result_of_unknown_task(
        self, client: NvflareClient, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Called by NVFlare with an answer that came too late, or twice."""
        if self._coordinator is None:
            return
        try:
            self._coordinator.refuse(client.name, _message(result))
        except MessageError as error:
            self.log_warning(fl_ctx, f"{client.name}: late answer refused: {error}")


def _message(result: Any) -> Message:
    if not isinstance(result, Shareable):
        raise MessageError("no answer")
    code = result.get_return_code(ReturnCode.OK)
    if code != ReturnCode.OK:
        raise MessageError(f"the site's NVFlare answered {code}")
    return from_wire(result)


def _why(task: Task, timeout: float) -> str:
    status = task.completion_status
    if status == TaskCompletionStatus.TIMEOUT:
        return f"no answer within {timeout:g} s"
    if status == TaskCompletionStatus.CLIENT_DEAD:
        return "its host or its NVFlare process is gone"
    if status is None or status in (TaskCompletionStatus.ABORTED, TaskCompletionStatus.CANCELLED):
        return "the job was ended"
    return f"NVFlare says {status.value}"


class _Log:
    """What the server's engineer should know, in ``server/log.txt``."""

    def __init__(self, workspace: Workspace) -> None:
        self._path = workspace.log

    def add(self, text: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {' '.join(text.split())}\n")
