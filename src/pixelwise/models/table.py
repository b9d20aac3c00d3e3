"""`python -m pixelwise.models.table` writes table.json: what `describe_model` says of every network.

`pixelwise models` prints the table, so that a list of names does not wait for torch; a test compares it with the networks.
"""

from pathlib import Path

from pixelwise.files import write_json
from pixelwise.models import describe_model, list_models

if __name__ == "__main__":
    write_json(Path(__file__).with_suffix(".json"), [describe_model(name) for name in list_models()])
