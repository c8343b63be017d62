"""Frames per second of the explorer's graph page at 2,000 nodes and 50,000 links, in a real Chromium.

    python -m benchmarks.graph_page --json OUT

The page is panned, zoomed, hovered and pruned, one step per frame, for some seconds each. A step of `prune`
moves the slider: nodes and links are chosen, laid out and drawn anew. `floor` is a canvas of the same size
that is filled with one colour in every frame: what this browser on this machine can do at most.

- `per_second`, `median_ms`, `p95_ms`: wall-clock frames.
- `cpu_ms`: CPU time per frame of all of the browser's processes together, which other work on the machine
  moves little. Below 33 ms, one core alone draws 30 frames a second; Chromium uses several.

Without a GPU Chromium rasterises on the CPU, which is the slowest case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.report import write_report
from tests.support.graphs import random_graph
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.serve import listen, make_app, server
from winnow.schemas.config import StorageSpec

DRAWN = ".stage canvas[data-drawn]"
WHOLE = "?page=graph&nodes=1&links=1"

_RUN = """async ([what, seconds]) => {
  const canvas = document.querySelector(".stage canvas"), plain = document.createElement("canvas"), box = canvas.getBoundingClientRect();
  const slider = document.querySelector("input[name=nodes]");
  const fire = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, { pointerId: 1, clientX: box.left + x, clientY: box.top + y, bubbles: true }));
  canvas.setPointerCapture = () => {};  // refuses pointers that no device has
  const step = {
    still: () => {},
    floor: (k) => { const pen = plain.getContext("2d"); pen.fillStyle = k % 2 ? "#ccc" : "#bbb"; pen.fillRect(0, 0, plain.width, plain.height); },
    pan: (k) => fire("pointermove", 300 + 200 * Math.sin(k / 15), 300 + 100 * Math.cos(k / 15)),
    hover: (k) => fire("pointermove", 60 + (k * 7) % (box.width - 90), 30 + (k * 13) % (box.height - 120)),
    zoom: (k) => canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: 20 * Math.sin(k / 10), ctrlKey: true, clientX: box.left + 400, clientY: box.top + 200, cancelable: true })),
    prune: (k) => { slider.value = 0.95 + 0.05 * Math.abs(Math.cos(k / 20)); slider.dispatchEvent(new Event("input", { bubbles: true })); },
  }[what];
  if (what === "pan") fire("pointerdown", 300, 400);
  if (what === "floor") { [plain.width, plain.height] = [box.width, box.height]; canvas.parentElement.prepend(plain); }
  const gaps = [], start = performance.now();
  for (let last = start, k = 0; performance.now() - start < 1000 * seconds; k++) {
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - last);
    last = now;
    step(k);
  }
  if (what === "pan") fire("pointerup", 300, 400);
  plain.remove();
  slider.value = 1;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  gaps.sort((a, b) => a - b);
  return { frames: gaps.length, per_second: 1000 * gaps.length / gaps.reduce((a, b) => a + b), median_ms: gaps[gaps.length >> 1], p95_ms: gaps[Math.floor(0.95 * gaps.length)] };
}"""  # noqa: E501


def frames(page: Any, seconds: float = 3.0) -> dict[str, dict[str, float]]:
    """What each way of moving costs, on a page that shows a graph.

    Returns:
        Way -> `frames`, `per_second`, `median_ms`, `p95_ms` and `cpu_ms`; see the module's docstring.
    """
    found: dict[str, dict[str, float]] = {}
    for way in ("still", "floor", "pan", "zoom", "hover", "prune"):
        before = _cpu_seconds(os.getpid())
        one = page.evaluate(_RUN, [way, seconds])
        one["cpu_ms"] = 1000 * (_cpu_seconds(os.getpid()) - before) / one["frames"]
        found[way] = {name: round(value, 1) for name, value in one.items()}
    return found


def _cpu_seconds(root: int) -> float:
    """CPU seconds of all processes below one, from /proc; 0 where there is none."""
    below: dict[int, list[tuple[int, int]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        below.setdefault(int(fields[1]), []).append(
            (int(path.parent.name), int(fields[11]) + int(fields[12]))
        )
    ticks, queue = 0, [root]
    while queue:
        for pid, used in below.get(queue.pop(), []):
            ticks += used
            queue.append(pid)
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(nodes: int, links: int, seconds: float) -> dict[str, Any]:
    """Serve a random graph, open it and move it; see the module's docstring."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on the PATH; Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="winnow-graph-") as folder:
        file = Path(folder, "graph.json")
        file.write_text(json.dumps(random_graph(nodes, links)))
        desk = open_desk([], None, Place(None, None, StorageSpec()), 4, [file])
        with listen("127.0.0.1", 0) as listener, sync_playwright() as driver:
            site = server(make_app(desk))
            thread = threading.Thread(target=site.run, kwargs={"sockets": [listener]})
            thread.start()
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/{WHOLE}")
            page.wait_for_selector(DRAWN, timeout=120_000)
            found = frames(page, seconds)
            version = browser.version
            browser.close()
            site.should_exit = True
            thread.join()
    moved = [found[way] for way in ("pan", "zoom", "hover", "prune")]
    return {
        "nodes": nodes,
        "links": links,
        "chromium": version,
        "load_average": os.getloadavg()[0],
        "slowest_per_second": min(each["per_second"] for each in moved),
        "slowest_over_floor": min(each["per_second"] for each in moved) / found["floor"]["per_second"],
        "most_cpu_ms": max(each["cpu_ms"] for each in moved),
        "ways": found,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--links", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="per way of moving")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    figures = measure(args.nodes, args.links, args.seconds)
    print(json.dumps(write_report("graph_page", figures, args.json), indent=1))


if __name__ == "__main__":
    main()
