"""Rows of the task capitals: the 100 countries with most people, and their capitals.

pip install countryinfo
python examples/lm_eval/make_capitals.py > capitals.jsonl
"""

import json
from pathlib import Path

import countryinfo

SHOTS = ("Jamaica", "Fiji")  # stand in the prompt
files = sorted((Path(countryinfo.__file__).parent / "data").glob("*.json"))
rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
rows = [row for row in rows if row.get("capital") and row.get("population") and row["name"] not in SHOTS]
for row in sorted(rows, key=lambda row: -row["population"])[:100]:
    print(json.dumps({"country": row["name"], "capital": row["capital"]}))
