"""Rows of imdb_choice and imdb_perplexity: the beginnings of 100 film reviews, half of them good.

python examples/lm_eval/make_rows.py ../shared/data/imdb/test.parquet > reviews.jsonl
"""

import json
import sys

import pyarrow.parquet

rows = pyarrow.parquet.read_table(sys.argv[1], columns=["text", "label"]).to_pylist()
for label in (0, 1):
    for row in [row for row in rows if row["label"] == label][:50]:
        print(json.dumps({"text": " ".join(row["text"].replace("<br />", " ").split()[:60]), "label": label}))
