"""Feeds Weights & Biases from standard input, one JSON object a line; see weights_and_biases.py, which starts it."""

import json
import sys
from typing import Any

import wandb


def main() -> None:
    """Read what to say until the end of the input."""
    hello = json.loads(sys.stdin.readline())
    run = wandb.init(
        id=hello["id"],
        name=hello["name"],
        project=hello["project"],
        mode=hello["mode"],
        dir=hello["directory"],
        config=hello["config"],
        resume="allow",
        # What the trainer's machine is and what is installed there is nobody's business.
        settings=wandb.Settings(console="off", x_save_requirements=False, x_disable_meta=True, x_disable_stats=True),
    )
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        _say(run, json.loads(line))
    run.finish()


def _say(run: Any, message: dict[str, Any]) -> None:
    if "summary" in message:
        run.summary.update(message["summary"])
        return
    values: dict[str, Any] = dict(message.get("values", {}))
    if "picture" in message:
        values[message["picture"]["name"]] = wandb.Image(message["picture"]["file"])
    # Pictures come when later steps are logged already, and wandb wants its own step to grow: ours is a value.
    run.log({"step": message["step"], **values})


if __name__ == "__main__":
    main()
