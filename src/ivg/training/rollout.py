"""Rollouts: responses sampled for prompts by any method, scored by a reward model or a Python function; resumable.

Columns: ``prompt`` (text or messages), ``index``, ``response``, ``token_ids`` (of the base), ``finish_reason``, ``ended`` (by an
end-of-sequence token), ``score``; ``error`` instead if the prompt cannot be answered or the response not scored; ``notes`` say what a
reward model could not read. Of models that think ``response`` and ``token_ids`` are what values read (``values_read``: the answer, or all),
and ``reasoning_content`` is the thinking. ``chat_template_kwargs`` and ``tools`` are those of the prompt, where it has some. In
Parquet these are JSON text, and so are ``messages`` in place of ``prompt`` where not all prompts are texts, or plain chats.

Blocks of prompts have their own seeds: an interrupted run gives the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, ScoreFault
from ivg.jobs.blocks import open_blocks
from ivg.jobs.prompts import CHAT_COLUMNS, chat_columns, prompt_of
from ivg.jobs.runner import LocalBackend, Result, Task, TaskSettings
from ivg.settings.train import RolloutSettings
from ivg.training.run_dir import require_single_process
from ivg.types import Prompt
from ivg.types.scores import judge_each
from ivg.utils.jsonl import read_jsonl, to_json
from ivg.utils.rng import as_seed, mix
from ivg.utils.rounding import keep_digits

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.types import Reward


_THINKING = ("guide_after", "thinking_budget", "values_read")
_MAX_BEAMS = 512
"""Beams of one batch, where the caller's blocks do not ask for more."""


def rollout(
    model: GuidedModel,
    prompts: Sequence[Prompt],
    out: str | Path,
    reward: Reward,
    *,
    method: str = "base",
    samples: int = RolloutSettings.samples,
    seed: int = 0,
    batch_size: int = RolloutSettings.batch_size,
    provenance: Mapping[str, Any] | None = None,
    on_progress: Callable[[], None] = lambda: None,
    **settings: Any,
) -> Path:
    """Sample and score ``samples`` responses for every prompt.

    Args:
        model: base and values.
        prompts: to answer.
        out: ``.jsonl`` or ``.parquet`` (written at the end from the JSONL beside it).
        reward: scores whole responses (``values.reward.load_reward``).
        method: any that ``model`` allows; with ``settings`` as for ``GuidedModel.request``.
        samples: responses for each prompt.
        seed: random seed.
        batch_size: prompts that are answered, scored and saved together.
        provenance: what else the rows depend on (names of models), for resuming.
        on_progress: called for each block, including those that are done already.

    Returns:
        ``out``.

    Raises:
        ConfigError: unusable settings, or a file that was made with others.
    """
    out = Path(out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"cannot write rollouts to {out}\n  expected a name that ends in .jsonl or .parquet")
    require_single_process("sampling rollouts")
    jsonl = out.with_suffix(".jsonl")
    sampling = {k: v for k, v in asdict(model.sampling).items() if k not in settings}
    if "choice" in sampling:
        sampling["choice"] = sampling["choice"] or []  # as files of version 0.2.0 have it
    own = {"method": method, "settings": settings, "sampling": sampling, "samples": samples, "seed": seed}
    with open_blocks(jsonl, batch_size * samples, len(prompts) * samples, {**own, **(provenance or {})}) as file:
        _check_prompts(jsonl, prompts, samples, file.rows)
        for _ in range(0, file.rows, batch_size * samples):
            on_progress()
        for span in file.missing():
            numbers = range(span.start // samples, -(-span.stop // samples))
            rows = _sample(model, [(n, prompts[n]) for n in numbers], method, samples, seed, settings)
            _score(reward, [row for row in rows if "error" not in row])
            file.append(rows)
            on_progress()
    if out != jsonl:
        _to_parquet(jsonl, out)
    return out


def _check_prompts(path: Path, prompts: Sequence[Prompt], samples: int, rows: int) -> None:
    """Raise if the existing rows answer other prompts.

    Raises:
        ConfigError: names the first such row.
    """
    if not rows:
        return
    for number, row in zip(range(rows), read_jsonl(path), strict=False):
        index = number // samples
        was = {name: row[name] for name in ("prompt", *CHAT_COLUMNS) if row.get(name)}
        if index < len(prompts) and was != _prompt_columns(prompts[index]):
            raise ConfigError(f"{path}, row {number + 1}: answers another prompt than this run\n  use another --out, or remove the file")


def _sample(
    model: GuidedModel, prompts: Sequence[tuple[int, Prompt]], method: str, samples: int, seed: int, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows without scores, prompt by prompt."""
    model.reset_caches()  # what earlier blocks left in the caches may change how sums are rounded
    whole = model.get_method(method, **{k: v for k, v in settings.items() if k in _THINKING}).values_read == "all"
    tasks = [
        Task(prompt, as_seed(mix(seed, number)), index, {**_prompt_columns(prompt), "index": index})
        for number, prompt in prompts
        for index in range(samples)
    ]
    for result in LocalBackend(model, TaskSettings(method, settings, max_beams=max(_MAX_BEAMS, len(tasks)))).run(tasks):
        result.task.source.update(_columns(result, model.base.vocabulary.eos_ids, whole=whole))
    return [task.source for task in tasks]


def _score(reward: Reward, rows: Sequence[dict[str, Any]]) -> None:
    """Add the scores, or errors, and notes to rows of answers."""
    pairs = [(prompt_of(row), row["response"]) for row in rows]
    for row, pair, score in zip(rows, pairs, judge_each(reward, pairs), strict=True):
        row |= {"error": " ".join(score.split())} if isinstance(score, ScoreFault) else {"score": keep_digits(score, 4)}
        if note := reward.note(*pair):
            row["notes"] = [*row.get("notes", []), note]


def _prompt_columns(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt.plain, **chat_columns(prompt)}


def _columns(result: Result[Any], eos: Collection[int], *, whole: bool) -> dict[str, Any]:
    """Of one answer; ``whole``: values read its thinking, too."""
    completion = result.completion
    if completion is None:
        return {"error": (result.error or "").split("\n")[0]}
    ids, text, thinking = list(completion.token_ids), completion.text, dict[str, Any]()
    if completion.guide_after is not None:
        thinking = {"reasoning_content": completion.reasoning_content}
        if completion.answer_start is None:
            return thinking | {"error": f"{completion.notes[-1]}; give a thinking_budget, or more max_new_tokens"}
        if not whole:
            ids, text = ids[completion.answer_start :], completion.answer
    ended = completion.finish_reason == "stop" and bool(ids) and ids[-1] in eos  # rather than by a stop string
    notes = {"notes": list(completion.notes)} if completion.notes else {}
    return notes | thinking | {"response": text, "token_ids": ids, "finish_reason": completion.finish_reason, "ended": ended}


def _to_parquet(jsonl: Path, out: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"writing {out} needs pyarrow\n  pip install 'ivg[train]'; the rows are in {jsonl}") from None
    partial = out.with_name(out.name + ".partial")
    rows = _with_plain_columns(list(read_jsonl(jsonl)))
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), partial)
    partial.replace(out)


def _with_plain_columns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose nested columns are JSON text: Parquet gives the objects of a column the keys of all its rows.

    Prompts stay in ``prompt`` where all are texts, or all are messages with a text each; else their messages are in ``messages``.
    """
    chats = [row["prompt"] for row in rows if not isinstance(row["prompt"], str)]
    same = not chats or (len(chats) == len(rows) and all(map(_is_plain_chat, chats)))
    out = []
    for row in rows:
        found = row | {name: to_json(row[name]) for name in CHAT_COLUMNS if name in row}
        if not same:
            is_text = isinstance(row["prompt"], str)
            found = {"prompt": row["prompt"] if is_text else None, "messages": None if is_text else to_json(row["prompt"])} | {
                name: value for name, value in found.items() if name != "prompt"
            }
        out.append(found)
    return out


def _is_plain_chat(turns: Any) -> bool:
    return all(set(turn) == {"role", "content"} and isinstance(turn["content"], str) for turn in turns)
