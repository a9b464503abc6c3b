"""The Celery app: all Celery settings there are, and the two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import worker_shutting_down

from dicom_node.dispatch import FORESEE, RUN

__all__ = ["SecurityWarning", "make_app"]


def make_app(
    broker: dict[str, Any],
    run: Callable[[int], None],
    stop: Callable[[], None] = lambda: None,
    foresee: Callable[[str, str], None] = lambda _series, _model: None,
) -> Celery:
    """Return an app whose tasks call `run` with a job's number, and `foresee` with a series and the name of a model.

    `broker` is `messages.celery_settings`; `stop` is called when the process is asked to end, while a task may run.
    """
    app = Celery("dicom_node_worker", set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        **broker,
    )

    @app.task(name=RUN)
    def run_job(job_id: int) -> None:
        run(job_id)

    @app.task(name=FORESEE, acks_late=False)  # what ends a worker is not given to it again
    def foresee_series(series_instance_uid: str, model: str) -> None:
        foresee(series_instance_uid, model)

    worker_shutting_down.connect(lambda **_: stop(), weak=False)
    return app
