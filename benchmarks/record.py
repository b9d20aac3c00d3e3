"""Turn a run folder into a result file to keep: the scores and how they came about, without paths of the machine.

python benchmarks/record.py runs/camvid --name camvid-lite0-30min --recipe recipes/camvid-lite0-30min.yaml
"""

import argparse
from datetime import datetime
from pathlib import Path

from pixelwise.files import read_json, write_json

KEPT_PLAN = ("model", "config", "parameters", "pretrained", "crop_px", "batch_size", "precision", "device", "classes")
KEPT_ENVIRONMENT = ("pixelwise", "torch", "python", "cpu", "cores", "seconds", "steps", "best_miou")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    plan, environment = read_json(args.run / "plan.json"), read_json(args.run / "environment.json")
    scores = {}
    for path in sorted(args.run.glob("evaluation-*.json")):
        evaluation = read_json(path)
        scores[evaluation["split"]] = {"images": evaluation["images"], **evaluation["scores"]}
    result = {
        "name": args.name,
        "recipe": args.recipe,
        "started": environment["started"],
        "plan": {key: plan[key] for key in KEPT_PLAN} | {"images": plan["data"]["images"]},
        "environment": {key: environment[key] for key in KEPT_ENVIRONMENT},
        "scores": scores,
    }
    date = datetime.fromisoformat(environment["started"]).date().isoformat()
    write_json(args.out / f"{date}-{args.name}.json", result)


if __name__ == "__main__":
    main()
