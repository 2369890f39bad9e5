"""Run folders as training leaves them, without training."""

import dataclasses
import json

from lwsam_bench.paper.runs.outcome import run_id


LAYERS = ("stem", "block/conv1", "block/conv2", "dense")
NOTE = "The images of this copy are JPEG."


def write(
    out,
    config,
    *,
    accuracy=0.5,
    loss=1.0,
    overhead=0.25,
    epochs=2,
    steps_per_epoch=3,
    layers=LAYERS,
    ended=True,
    diverged=False,
    time="2026-01-01T00:00:00+00:00",
):
    """Write the folder of a run; the k-th step perturbs one layer after the other."""
    folder = out / "runs" / run_id(config)
    folder.mkdir(parents=True)
    total = epochs * steps_per_epoch
    origin = {"from_step": 0, "time": time, "commit": "c" * 40, "platform": "cpu"}
    record = {
        "config": dataclasses.asdict(config),
        "data": {"name": config.dataset, "note": NOTE},
        "total_steps": total,
        "provenance": [origin],
    }
    (folder / "config.json").write_text(json.dumps(record))
    counts = dict.fromkeys(layers, 0)
    rows = []
    for step in range(1, total + 1):
        where = {"step": step, "epoch": step / steps_per_epoch}
        chosen = layers[step % len(layers)]
        counts[chosen] += 1
        rows.append(
            {
                "kind": "train",
                **where,
                "loss": loss + 1 / step,
                "overhead": overhead,
                "perturbed": [chosen],
                # In another order than that of their depth.
                "norms": {x: (3.0, 4.0)[i % 2] for i, x in enumerate(sorted(layers))},
            }
        )
        if step % steps_per_epoch == 0:
            found = {"loss": loss, "accuracy": accuracy * where["epoch"] / epochs}
            rows.append({"kind": "test", **where, **found})
    if ended:
        end = {"loss": None if diverged else loss, "accuracy": accuracy}
        end |= {"overhead": overhead, "perturbed": counts, "diverged": diverged}
        rows.append({"kind": "end", **where, **end})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder
