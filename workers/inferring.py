"""An inference job: a series becomes a volume, a prediction, findings, result objects, durable bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog

from dicom_node.catalogue import ModelFolder, read_model
from dicom_node.config import Settings
from dicom_node.created import created_results
from dicom_node.dispatch import Hints
from dicom_node.errors import Unavailable
from dicom_node.forms import DEFAULT_RESULTS, Form, Wish, forms_to_make
from dicom_node.labelling import Context, ModelIdentity, Predecessor, digest_of_input
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import StoredInstance
from dicom_node.ledger.moving import Job, StoredResult
from dicom_node.lifecycle import Kind, State
from dicom_node.manifest import Manifest
from dicom_node.rations import understood
from dicom_node.results import ORDER, Result, encode_all, encoder
from dicom_node.results.pieces import pieces
from dicom_node.selfcheck import require_sound
from dicom_node.source import Source
from dicom_node.spool import Draft, Spool
from workers.attempt import Attempt
from workers.bundle import Bundle, Bundles
from workers.choosing import Choosing, Chosen
from workers.findings_of import findings_of
from workers.guarding import guarded
from workers.prediction import Prediction
from workers.stopwatch import Stopwatch

log = structlog.get_logger()

_LOADED, _PREDICTED = 0.1, 0.9  # share of the progress bar at which these stages end


@dataclass(frozen=True, slots=True)
class Loaded:
    """A job's series in memory, and the model that is to see it."""

    model: ModelFolder
    chosen: Chosen


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a model said, and about what."""

    bundle: Bundle
    chosen: Chosen
    prediction: Prediction


class Inferring:
    """The three steps of an inference: load, predict, record. A model once loaded stays."""

    def __init__(self, settings: Settings, ledger: Ledger, spool: Spool, hints: Hints) -> None:
        """Read series from `ledger` and `spool`; keep results there; say by `hints` that they can be delivered."""
        self._settings = settings
        self._ledger = ledger
        self._spool = spool
        self._hints = hints
        self._choosing = Choosing(ledger, spool)
        self._bundles = Bundles(device=settings.node.device, budget=settings.node.model_memory_megabytes)

    def warming(self) -> Iterator[Callable[[], None]]:
        """Yield what is to be loaded before the first study comes, piece by piece."""
        for kind in ORDER:
            encoder(kind)
        for name in self._settings.routed_models:
            yield partial(self._bundles.warm, self._settings.node.models / name)

    def rehearse(self) -> None:
        """Encode a small example in every kind: the libraries read their tables when they are first used."""
        created_results()

    def foresee(self, series_instance_uid: str, model: str) -> None:
        """Read a series before its job is there; raise what that would."""
        if model not in self._settings.routed_models:
            return
        found = read_model(self._settings.node.models / model)
        began = time.monotonic()
        with understood():
            volume = self._choosing.foresee(series_instance_uid, found.manifest)
        if volume is not None:
            if len(found.manifest.inputs) == 1:  # else the model is given more than this
                self._bundles.prepare(found, volume.grid)
            seconds = round(time.monotonic() - began, 2)
            log.info("series.foreseen", series_instance_uid=series_instance_uid, model=model, seconds=seconds)

    def load(self, attempt: Attempt) -> Loaded:
        """Read a job's series; raise NotApplicable, Refused or Unavailable where there is nothing to run."""
        model = read_model(self._settings.node.models / attempt.job.model)
        with attempt.watch.stage("load"), understood():
            chosen = self._choosing(attempt.job, model)
            self._bundles.prepare(model, chosen.volume.grid)
        attempt.lease.report(_LOADED)
        return Loaded(model, chosen)

    def predict(self, attempt: Attempt, loaded: Loaded) -> Predicted:
        """Run the model; raise what its lease raises, between two windows."""
        with attempt.watch.stage("prepare"):
            bundle = self._bundles.get(loaded.model.folder)
        with attempt.watch.stage("model"):
            prediction = bundle.model(
                loaded.chosen.volume.grid,
                lambda part: attempt.lease.report(_LOADED + part * (_PREDICTED - _LOADED), may_yield=part < 1.0),
            )
        return Predicted(bundle, loaded.chosen, prediction)

    def predict_together(self, group: Sequence[tuple[Attempt, Loaded]]) -> list[Predicted] | None:
        """Run a model on several small inputs at once; None where that fails: then each is to be run alone."""
        try:
            bundle = self._bundles.get(group[0][1].model.folder)
            for attempt, _ in group:
                attempt.watch.begin("model")
            model: Any = bundle.model  # `execution.together` is only for those that can
            predictions = model.many([loaded.chosen.volume.grid for _, loaded in group], lambda part: None)
        except Exception as error:  # of whichever of them; it is said when that one is run alone
            log.warning(
                "model.not_together", model=group[0][0].job.model, studies=len(group), error=type(error).__name__
            )
            return None
        finally:
            for attempt, _ in group:
                attempt.watch.end()
        return [Predicted(bundle, one[1].chosen, made) for one, made in zip(group, predictions, strict=True)]

    def remaining(self, attempt: Attempt, *, now: float) -> float | None:
        """Return the seconds that a model still needs at its present pace; None where nobody can tell."""
        began, part = attempt.watch.began.get("model"), attempt.lease.progress - _LOADED
        if began is None or part <= 0.0:
            return None
        return (now - began) * (_PREDICTED - _LOADED - part) / part

    def record(self, attempt: Attempt, predicted: Predicted) -> None:
        """Encode what the model said, keep it, and have it delivered."""
        job, watch, bundle, chosen = attempt.job, attempt.watch, predicted.bundle, predicted.chosen
        manifest, volume = bundle.manifest, chosen.volume
        attempt.lease.report(_PREDICTED)
        context = self._context(job, bundle, chosen.instances)
        with watch.stage("encode"):
            findings = findings_of(guarded(predicted.prediction, volume.grid, manifest), volume, manifest, context)
            kinds, forms = self._wanted(job, manifest)
            results = encode_all(kinds, findings, volume.source, context, forms)
        stored = self._written(results, forms, volume.source, watch)
        try:
            deliveries = self._ledger.jobs.inferred(
                job, stored, now=time.time(), seconds=watch.seconds, began=watch.began, notes=volume.notes
            )
            self._announce(deliveries)
        finally:
            self._sweep(job, stored)
        log.info("job.inferred", results=len(stored), findings=len(findings.findings), **watch.seconds)

    def _written(
        self, results: Sequence[Result], forms: Sequence[Form], source: Source, watch: Stopwatch
    ) -> list[StoredResult]:
        """Write the objects, check them as they lie on the disk, and only then give them their places."""
        with ExitStack() as stack:
            with watch.stage("encode"):
                drafts = [stack.enter_context(self._spool.draft(pieces(result.dataset))) for result in results]
            with watch.stage("check"):
                for form in forms:
                    of_form = [
                        draft.path
                        for result, draft in zip(results, drafts, strict=True)
                        if result.form in (None, form.key)
                    ]
                    require_sound(of_form, source)
            with watch.stage("keep"):
                return [self._keep(*pair) for pair in zip(results, drafts, strict=True)]

    def close(self) -> None:
        """End the models that live in processes of their own."""
        self._bundles.close()

    def _sweep(self, job: Job, made: Sequence[StoredResult]) -> None:
        """Delete what attempts wrote in vain: where the ledger has a result, other files of its UID are nobody's.

        Without a row they stay: they may be another worker's, which has the job now and is about to record them.
        """
        try:
            paths = {
                row["sop_instance_uid"]: row["path"] for row in self._ledger.history.results_of(job.series_instance_uid)
            }
            current = self._ledger.jobs.get(job.job_id)
            for result in made:
                if result.sop_instance_uid in paths:
                    self._spool.forget_other_results(result.sop_instance_uid, paths[result.sop_instance_uid])
                elif current is not None and current.state is State.CANCELLED:
                    self._spool.absolute(result.path).unlink(missing_ok=True)
        except (Unavailable, OSError) as error:
            log.warning("results.not_swept", error=type(error).__name__)

    def _announce(self, deliveries: Sequence[int]) -> None:
        """Have the results sent at once; without a broker the node's sweep does it, a little later."""
        try:
            self._hints.send({Kind.DELIVER: deliveries}, now=time.time())
        except Unavailable as error:
            log.info("deliveries.not_announced", reason=str(error))

    def _wanted(self, job: Job, manifest: Manifest) -> tuple[list[str], list[Form]]:
        """Return the kinds that the peers ask for and the model may be told in, and the forms that they may need."""
        forms: dict[Form, None] = {}
        wished: set[str] = set()
        for name in job.send_to:
            # a peer that has left the settings gets what peers get by default: its delivery fails, and says why
            peer = self._settings.peer.get(name)
            wish = peer.wish if peer else Wish(DEFAULT_RESULTS)
            takes = self._ledger.peers.takes(peer.address, now=time.time()) if peer else {}
            wished.update(wish.kinds)
            forms |= dict.fromkeys(forms_to_make(wish, takes))
        return [kind for kind in ORDER if kind in wished and kind in manifest.results], list(forms)

    def _context(self, job: Job, bundle: Bundle, instances: Sequence[StoredInstance]) -> Context:
        labelling = self._settings.labelling
        manifest = bundle.manifest
        return Context(
            model=ModelIdentity(manifest.name, manifest.version, manifest.title, manifest.manufacturer, bundle.digest),
            input_digest=digest_of_input((instance.sop_instance_uid, instance.digest) for instance in instances),
            now=datetime.now(UTC).astimezone(),
            series_number=labelling.series_number,
            qualification=labelling.qualification,
            disclaimer=labelling.disclaimer,
            ae_title=self._settings.node.ae_title,
            predecessors=self._predecessors(job),
        )

    def _predecessors(self, job: Job) -> tuple[Predecessor, ...]:
        """Return the report that this one supersedes, where an earlier revision of the series had one."""
        earlier = self._ledger.jobs.earlier_results(job.series_instance_uid, job.model, before_revision=job.revision)
        return tuple(
            Predecessor(
                result.sop_class_uid,
                result.sop_instance_uid,
                result.series_instance_uid,
                result.study_instance_uid,
                result.form,
            )
            for result in earlier
            if result.kind == "sr"
        )

    def _keep(self, result: Result, draft: Draft) -> StoredResult:
        """Keep an object as it was written; from here on only these bytes are sent."""
        dataset = result.dataset
        return StoredResult(
            sop_instance_uid=dataset.SOPInstanceUID,
            sop_class_uid=dataset.SOPClassUID,
            series_instance_uid=dataset.SeriesInstanceUID,
            study_instance_uid=dataset.StudyInstanceUID,
            transfer_syntax_uid=dataset.file_meta.TransferSyntaxUID,
            kind=result.kind,
            form=result.form,
            path=self._spool.keep_draft(dataset.SOPInstanceUID, draft),
            sha256=draft.sha256,
            size=draft.size,
        )
