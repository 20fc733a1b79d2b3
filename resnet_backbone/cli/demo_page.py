"""A page to try a detector on, with Gradio: drop a picture, move the threshold, take the JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from resnet_backbone.detection.inference.pictures import draw_output
from resnet_backbone.detection.inference.predictor import describe_output
from resnet_backbone.runtime.errors import UsageError

try:
    import gradio
except ImportError as error:
    raise UsageError("--web needs Gradio: pip install 'resnet_backbone[web]'") from error

COLUMNS = ["class", "score", "x0", "y0", "x1", "y1"]


def build_page(demo: Any) -> gradio.Blocks:
    """The page of a :class:`resnet_backbone.cli.demo.Demo`.

    A picture goes through the detector once; the threshold then chooses among what it found.
    """
    title = f"What {demo.args.run or demo.args.config_file} finds"

    def detect(picture: np.ndarray | None, threshold: float):
        output = None if picture is None else demo.predictor(picture[:, :, ::-1])
        return (output, *show(picture, output, threshold))

    def show(picture: np.ndarray | None, output: dict | None, threshold: float):
        if output is None:
            return None, [], "Drop a picture on the left.", None
        shown = demo.above(output, threshold)
        found = describe_output(shown, *demo.names)
        rows = [
            [one["class"], round(one.get("score", one.get("share", 0)), 3), *one.get("box", [])]
            for one in found
        ]
        text = f"{len(found)} detections with a score of {threshold:.2f} or more"
        if not found and "instances" in output and len(output["instances"]):
            text += f"; the best has {output['instances'].scores.max():.2f}: move the threshold"
        file = Path(tempfile.mkdtemp(), "detections.json")
        file.write_text(json.dumps({"confidence": threshold, "detections": found}, indent=1))
        return draw_output(picture, shown, *demo.names, threshold), rows, text, str(file)

    with gradio.Blocks(title=title) as page:
        gradio.Markdown(f"## {title}")
        state = gradio.State()
        with gradio.Row():
            picture = gradio.Image(label="picture", type="numpy", image_mode="RGB")
            drawn = gradio.Image(label="detections", interactive=False)
        threshold = gradio.Slider(0.05, 1, demo.args.confidence, step=0.01, label="least score")
        text = gradio.Markdown()
        table = gradio.Dataframe(headers=COLUMNS, interactive=False)
        file = gradio.DownloadButton("Download as JSON")
        results = [drawn, table, text, file]
        picture.change(detect, [picture, threshold], [state, *results])
        threshold.change(show, [picture, state, threshold], results, show_progress="hidden")
    return page


def serve(demo: Any) -> None:
    """Shows the page until Ctrl-C."""
    address = f"http://{demo.args.host}:{demo.args.port}"
    print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
    options = dict(server_name=demo.args.host, server_port=demo.args.port, quiet=True)
    try:
        build_page(demo).launch(**options)
    except OSError as error:
        raise UsageError(f"--port {demo.args.port}: {error}; choose another one") from error
