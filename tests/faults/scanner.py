"""Who sends: a scanner that keeps what is not acknowledged and sends it again, as scanners do."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pynetdicom import AE, _config
from xxhash import xxh3_128_hexdigest

from tests.datasets import CT, EXPLICIT, dataset_bytes_of


@dataclass(frozen=True, slots=True)
class Image:
    """One instance as it is sent."""

    path: Path
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    digest: str  # of the data set

    @classmethod
    def of(cls, path: Path) -> Image:
        header = dcmread(path, stop_before_pixels=True)
        digest = xxh3_128_hexdigest(dataset_bytes_of(path.read_bytes()))
        uids = header.SOPInstanceUID, header.SeriesInstanceUID, header.StudyInstanceUID
        return cls(path, *(str(uid) for uid in uids), digest)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An instance that was answered 0x0000, and how far a clock of the test's own had come by then."""

    image: Image
    at: int


class Scanner(threading.Thread):
    """Sends studies one after the other, each until every instance is acknowledged."""

    def __init__(
        self,
        port: int,
        studies: Sequence[Sequence[Image]],
        *,
        chance: random.Random | None = None,
        ticks: Callable[[], int] = lambda: 0,
        pause: float = 0.3,
        timeout: float = 8.0,
        name: str = "SCANNER",
    ) -> None:
        """With `chance`: in any order, on several associations, and some instances twice."""
        super().__init__(daemon=True, name=name)
        self._port, self._studies = port, studies
        self._chance, self._ticks, self._pause = chance, ticks, pause
        self._timeout = timeout
        self._given_up = threading.Event()
        self.acknowledged: dict[str, Acknowledged] = {}
        self.refused: dict[int, int] = {}  # status to number

    def run(self) -> None:
        for images in self._studies:
            left = list(images)
            while left and not self._given_up.is_set():
                left = self._send(self._shuffled(left)) + self._held_back
                if left:
                    time.sleep(self._pause)

    def give_up(self) -> None:
        """Send nothing any more."""
        self._given_up.set()

    def _shuffled(self, images: list[Image]) -> list[Image]:
        self._held_back: list[Image] = []
        if self._chance is None:
            return images
        self._chance.shuffle(images)
        if self._chance.random() < 0.3:
            half = len(images) // 2
            images, self._held_back = images[half:], images[:half]
        return images + self._chance.sample(images, min(2, len(images)))

    def _send(self, images: list[Image]) -> list[Image]:
        """Send on one association; return what was not acknowledged."""
        _config.STORE_SEND_CHUNKED_DATASET = True  # the bytes of the file, not pydicom's idea of them
        entity = AE(ae_title=self.name[:16])
        entity.connection_timeout = 2.0
        entity.acse_timeout = 10.0
        entity.dimse_timeout = entity.network_timeout = self._timeout
        entity.add_requested_context(CT, EXPLICIT)
        association = entity.associate("127.0.0.1", self._port)
        if not association.is_established:
            return images
        left = []
        for image in images:
            status = None
            if association.is_established and not self._given_up.is_set():
                with contextlib.suppress(RuntimeError, ValueError, OSError):
                    status = association.send_c_store(image.path).get("Status")
            if status == 0x0000:
                self.acknowledged.setdefault(image.sop_instance_uid, Acknowledged(image, self._ticks()))
            else:
                left.append(image)
                if status is not None:
                    self.refused[status] = self.refused.get(status, 0) + 1
        if association.is_established:
            association.release()
        return list(dict.fromkeys(image for image in left if image.sop_instance_uid not in self.acknowledged))
