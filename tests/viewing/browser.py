"""OHIF in headless Chromium: opened, asked for its own state, photographed."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ARGUMENTS = [
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),
]
_THUMBNAIL = "[data-cy=study-browser-thumbnail-no-image]"
_VIEWPORT = "[data-cy=viewport-pane] canvas, .cornerstone-canvas"


class Viewer:
    """One page of OHIF; what went wrong in it is in `problems`."""

    def __init__(self, page: Page, url: str, pictures: Path) -> None:
        self.url, _, self._token = url.partition("/?token=")
        self.page, self.pictures = page, pictures
        self.problems: list[str] = []
        self.requests_elsewhere: list[str] = []
        self.warnings: Counter[str] = Counter()
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("response", self._look_at)
        page.on("console", self._listen)
        page.route("**/*", self._stay_here)

    def _look_at(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"HTTP {response.status}: {urlsplit(response.url).path}")

    def _listen(self, message: Any) -> None:
        """Errors on the console are problems; warnings are counted by their beginning."""
        if message.type == "warning":
            self.warnings[message.text.partition(":")[0]] += 1
        elif message.type == "error":
            self.problems.append(f"console: {message.text[:200]}")

    def _stay_here(self, route: Any) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(self.url).netloc or route.request.url.startswith(
            ("data:", "blob:")
        ):
            route.continue_()
        else:
            self.requests_elsewhere.append(route.request.url)
            route.abort()

    def open(self, study_instance_uid: str, *series_instance_uids: str) -> None:
        """Open some series of a study and wait for the first image."""
        series = f"&SeriesInstanceUIDs={','.join(series_instance_uids)}" if series_instance_uids else ""
        self.page.goto(f"{self.url}/viewer?StudyInstanceUIDs={study_instance_uid}{series}&token={self._token}")
        self.page.wait_for_function(
            "() => window.cornerstone && cornerstone.getRenderingEngines().some("
            "e => e.getViewports().some(v => v.getImageIds && v.getImageIds().length && v.getCurrentImageId()))",
            timeout=60_000,
        )
        self.page.wait_for_timeout(2500)

    def open_result(self, text: str | re.Pattern[str]) -> None:
        """Double-click a result in the study browser, by words of its description, and wait until it is shown."""
        entry = self.page.locator(_THUMBNAIL).filter(has_text=text).first
        entry.wait_for(timeout=30_000)
        entry.dblclick()
        self.page.wait_for_timeout(4000)

    def press(self, text: str) -> bool:
        """Press a button where there is one; return whether there was."""
        button = self.page.get_by_role("button", name=text, exact=True)
        if button.count() == 0:
            return False
        button.first.click()
        self.page.wait_for_timeout(2500)
        return True

    def ask(self, script: str, argument: Any = None) -> Any:
        """Return what a function answers in the page."""
        return self.page.evaluate(script, argument)

    def go_to(self, sop_instance_uid: str) -> None:
        """Show one image of the stack in the first viewport."""
        found = self.ask(
            """async uid => {
                const viewport = cornerstone.getRenderingEngines()[0].getViewports()[0];
                const index = viewport.getImageIds().findIndex(
                    id => cornerstone.metaData.get('sopCommonModule', id)?.sopInstanceUID === uid || id.includes(uid));
                if (index >= 0) { await viewport.setImageIdIndex(index); viewport.render(); }
                return index;
            }""",
            sop_instance_uid,
        )
        assert found >= 0, "the viewport has no such image"
        self.page.wait_for_timeout(1500)

    def picture(self, name: str) -> npt.NDArray[np.uint8]:
        """Keep a picture of the page and return that of the viewport alone, `(rows, columns, 3)`."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"{name}.png")
        content = self.page.locator(_VIEWPORT).first.screenshot()
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def place_on_canvas(self, point: list[float]) -> tuple[float, float]:
        """Return where on the viewport's picture a point of the patient (mm) is drawn."""
        x, y = self.ask("point => cornerstone.getRenderingEngines()[0].getViewports()[0].worldToCanvas(point)", point)
        return float(x), float(y)

    def segmentations(self) -> list[dict[str, Any]]:
        """Return every segmentation that is loaded: its segments' labels, colours and voxel counts."""
        return self.ask(
            """() => {
                const {segmentationService} = window.services;
                const viewportId = cornerstone.getRenderingEngines()[0].getViewports()[0].id;
                return segmentationService.getSegmentations().map(segmentation => {
                    const counts = {};
                    const labelmap = segmentation.representationData.Labelmap;
                    for (const id of labelmap.imageIds || []) {
                        const image = cornerstone.cache.getImage(id);
                        const values = image.voxelManager.getScalarData();
                        for (let n = 0; n < values.length; n++) {
                            if (values[n]) counts[values[n]] = (counts[values[n]] || 0) + 1;
                        }
                    }
                    return Object.values(segmentation.segments).map(segment => ({
                        index: segment.segmentIndex, label: segment.label, voxels: counts[segment.segmentIndex] || 0,
                        colour: Array.from(segmentationService.getSegmentColor(
                            viewportId, segmentation.segmentationId, segment.segmentIndex)).slice(0, 3),
                    }));
                }).flat();
            }"""
        )

    def boxes(self) -> list[dict[str, Any]]:
        """Return every annotation that is drawn: its tool, its image and its points in the patient (mm)."""
        return self.ask(
            """() => cornerstoneTools.annotation.state.getAllAnnotations().map(a => ({
                tool: a.metadata.toolName, image: a.metadata.referencedImageId,
                points: (a.data.handles?.points || Object.values(a.data.renderableData || {}).flat(2)).map(
                    p => Array.from(p)),
            }))"""
        )

    def measurement_panel(self, picture: str) -> dict[int, tuple[str, str]]:
        """Open the measurement panel; return its rows: number of the image -> what is there, its details."""
        self.page.locator("[data-cy=trackedMeasurements-btn]").first.click()
        self.page.wait_for_timeout(2500)
        self.picture(picture)
        rows: dict[int, tuple[str, str]] = {}
        for row in self.page.locator("[data-cy^=measurement-table-row]").all():
            title = row.locator("[data-cy=data-row-title]").inner_text().strip()
            details = row.locator("[data-cy=data-row-details]").inner_text()
            rows[int(re.search(r"I: (\d+)", details)[1])] = title, details
        return rows

    def measurements(self) -> list[dict[str, Any]]:
        """Return what the measurement service holds: hydrated findings."""
        return self.ask(
            """() => window.services.measurementService.getMeasurements().map(m => ({
                label: m.label, tool: m.toolName, sop: m.SOPInstanceUID, points: m.points,
                text: JSON.stringify(m.displayText),
            }))"""
        )


@contextmanager
def viewer(executable: str, url: str, profile: Path, pictures: Path) -> Iterator[Viewer]:
    """Run Chromium with a fresh profile until the end of the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1400, "height": 900},
        )
        try:
            yield Viewer(browser.new_page(), url, pictures)
        finally:
            browser.close()
