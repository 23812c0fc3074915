"""Stage 1, data: rows of a dataset become chat-templated prompts (`order` says which of them a step takes).

Column names are found by looking for the usual ones (case does not matter, a dot reaches into a mapping); the
configuration can name them instead. Known layouts: verl (`prompt` as chat messages, `reward_model.ground_truth`,
`extra_info.index`, `extra_info.opd_teacher`, `data_source`), DeepMath (`question`, `final_answer`), AIME
(`problem`, `solution`, `answer`), AIME 2025 (`question`, `answer`), GSM8K (`question`, `answer` ending in `#### 72`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcopd_fast import miniature
from tcopd_fast.config_sections import DataConfig, PromptSourceConfig
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
# A worked solution is the last resort: the judge reads the \boxed{} in it.
ANSWER_COLUMNS = ("reward_model.ground_truth", "final_answer", "answer", "ground_truth", "expected_answer", "solution")
DOMAIN_COLUMNS = ("domain", "extra_info.opd_teacher")
ID_COLUMNS = ("id", "unique_id", "uid", "problem_id", "extra_info.index")
SOURCE_COLUMNS = ("data_source",)
ROLES = ("system", "user", "assistant", "tool")
RESERVED_TEMPLATE_KWARGS = ("conversation", "add_generation_prompt", "tokenize", "return_dict", "return_tensors")

Message = dict[str, str]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in source order, and how many rows were left out for being longer than `max_prompt_tokens`.

    Prompt ids are unique over the whole set: a repeated id gets `#2`, `#3`, … in order of appearance.
    """

    prompts: tuple[Prompt, ...]
    dropped_overlong: int


@dataclass(frozen=True)
class _Table:
    """A source before its rows are read. rows(columns) yields (row number from 1, row) with those columns."""

    path: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[tuple[int, Mapping[str, Any]]]]


@dataclass(frozen=True)
class _Question:
    """A row after its columns were read, before the template."""

    where: str
    id: str
    domain: str
    messages: list[Message]
    answer: str | None
    source: str


def load_prompts(
    sources: Sequence[PromptSourceConfig], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> PromptSet:
    """Read every source, apply the chat template, tokenize, and drop or refuse what is too long.

    With `data.chat_template` off the user's text is tokenized as it is (the tokenizer's own default decides about
    special tokens). Raises UserError naming source, row and column for unreadable sources, missing columns, bad
    rows, a tokenizer without a chat template, over-long prompts under `overlong: refuse`, and an empty result.
    """
    _check_template_settings(tokenizer, data)
    questions = [question for source in sources for question in _questions(source)]
    ids = _unique(question.id for question in questions)
    conversations = [_conversation(question, data) for question in questions]
    token_ids = _tokenize(conversations, questions, tokenizer, data)
    prompts = []
    for question, prompt_id, tokens in zip(questions, ids, token_ids, strict=True):
        if not tokens:
            raise UserError(f"{question.where}: the prompt has no tokens")
        if len(tokens) <= data.max_prompt_tokens:
            problem = question.messages[-1]["content"]
            prompts.append(Prompt(prompt_id, question.domain, tuple(tokens), problem, question.answer, question.source))
        elif data.overlong == "refuse":
            raise UserError(
                f"{question.where}: prompt {prompt_id!r} has {len(tokens)} tokens, data.max_prompt_tokens is "
                f"{data.max_prompt_tokens}; raise it or set data.overlong=drop"
            )
    if not prompts:
        raise UserError(
            f"data: all {len(questions)} prompts of {', '.join(source.path for source in sources)} are longer than "
            f"data.max_prompt_tokens={data.max_prompt_tokens}; raise it"
        )
    return PromptSet(tuple(prompts), len(questions) - len(prompts))


def load_eval_sets(
    sources: Sequence[PromptSourceConfig], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> dict[str, tuple[Prompt, ...]]:
    """Held-out problems by set name: the source's `name`, else its last path part without suffixes.

    Raises UserError, beside what `load_prompts` raises, for a problem without an answer and for two sets of one name.
    """
    sets: dict[str, tuple[Prompt, ...]] = {}
    for source in sources:
        name = source.name or source.path.removeprefix("miniature:").rstrip("/").split("/")[-1].split(".")[0]
        if name in sets:
            raise UserError(f"evaluation set {source.path}: a second set named {name!r}; rename one of the files")
        sets[name] = load_prompts([source], tokenizer, data).prompts
        unanswered = [prompt.id for prompt in sets[name] if prompt.answer is None]
        if unanswered:
            raise UserError(
                f"evaluation set {source.path}: {len(unanswered)} of {len(sets[name])} problems have no reference "
                f"answer, the first is {unanswered[0]!r}; set answer_column or remove those rows"
            )
    return sets


# Sources: everything becomes a _Table.


def _open(source: PromptSourceConfig) -> _Table:
    path = source.path
    if path.startswith("miniature:"):
        return _open_local(miniature.asset(path.removeprefix("miniature:")), source)
    local = Path(path).expanduser()
    looks_local = path.startswith(("/", "./", "../", "~")) or local.suffix in (".jsonl", ".json", ".parquet")
    if local.exists():
        return _open_local(local, source)
    if looks_local:
        raise UserError(f"data source {path}: no such file or folder; check the path (relative to {Path.cwd()})")
    return _open_hub(source)


def _open_local(path: Path, source: PromptSourceConfig) -> _Table:
    if path.is_dir():
        return _open_folder(path, source)
    if path.suffix == ".parquet":
        return _open_parquet(path)
    if path.suffix in (".jsonl", ".json"):
        return _open_json(path)
    raise UserError(f"data source {path}: unknown file type {path.suffix!r}; give a .jsonl, .json or .parquet file")


def _open_json(path: Path) -> _Table:
    """JSON lines (row numbers are line numbers), or one JSON list of objects."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data source {path}: not UTF-8 text ({error})") from error
    rows: list[tuple[int, Any]] = []
    number = 1
    try:
        if text.lstrip().startswith("["):
            rows = list(enumerate(json.loads(text), 1))
        else:
            # Not splitlines(): JSON strings may contain U+2028 and other characters that it breaks lines at.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except json.JSONDecodeError as error:
        line_number = number + error.lineno - 1
        raise UserError(f"data source {path}, row {line_number}: not valid JSON ({error.msg})") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"data source {path}, row {number}: expected a JSON object, found {type(row).__name__}")
    columns = tuple(dict.fromkeys(column for _, row in rows for column in row))
    return _Table(str(path), columns, lambda wanted: iter(rows))


def _open_parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data source {path}: not a readable parquet file ({error})") from error

    def rows(wanted: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        batches = file.iter_batches(batch_size=1024, columns=list(wanted))
        return enumerate((row for batch in batches for row in batch.to_pylist()), 1)

    return _Table(str(path), tuple(file.schema_arrow.names), rows)


def _open_folder(path: Path, source: PromptSourceConfig) -> _Table:
    """A folder written by `save_to_disk`, or a downloaded dataset of parquet, JSON or Arrow files."""
    import datasets

    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path), source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data source {path}: cannot read split {source.split!r} ({_one_line(error)}); "
            "check the folder and the source's name and split"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise UserError(f"data source {path}: no split {source.split!r}; it has {', '.join(dataset)}")
        dataset = dataset[source.split]
    return _from_dataset(str(path), dataset)


def _open_hub(source: PromptSourceConfig) -> _Table:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data source {source.path} (name {source.name}, split {source.split}): cannot be loaded from the Hugging "
            f"Face hub ({_one_line(error)}); check the id, name and split, or give the path of a downloaded copy"
        ) from error
    return _from_dataset(source.path, dataset)


def _from_dataset(path: str, dataset: Any) -> _Table:
    # Unused columns are dropped before reading: worked solutions can be thousands of times larger than the rest.
    return _Table(
        path, tuple(dataset.column_names), lambda wanted: enumerate(iter(dataset.select_columns(list(wanted))), 1)
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# Rows: everything becomes a _Question.


def _questions(source: PromptSourceConfig) -> list[_Question]:
    table = _open(source)
    prompt = _columns(table, "prompt", source.prompt_column, PROMPT_COLUMNS)
    answer = _columns(table, "answer", source.answer_column, ANSWER_COLUMNS)
    domain = _columns(table, "domain", source.domain_column, DOMAIN_COLUMNS)
    identity = _columns(table, "id", None, ID_COLUMNS)
    origin = _columns(table, "source", None, SOURCE_COLUMNS)
    if not prompt:
        found = f"it has {', '.join(table.columns)}" if table.columns else "it is empty"
        raise UserError(
            f"data source {table.path}: no prompt column found ({found}); set the source's prompt_column "
            f"(looked for {', '.join(PROMPT_COLUMNS)})"
        )
    used = prompt + answer + domain + identity + origin
    wanted = dict.fromkeys(name if name in table.columns else name.split(".")[0] for name in used)
    questions = []
    for number, row in islice(table.rows(list(wanted)), source.limit):
        where = f"data source {table.path}, row {number}"
        hint = f"; columns are {', '.join(table.columns)}"
        if source.domain is None and source.domain_column and _first(row, domain) is None:
            raise UserError(f"{where}: column {source.domain_column!r} has no value{hint}")
        questions.append(
            _Question(
                where=where,
                id=str(_first(row, identity, number - 1)),
                domain=source.domain or str(_first(row, domain, "default")),
                messages=_messages(_first(row, prompt), f"{where}, column {prompt[0]!r}", hint),
                answer=_answer(_first(row, answer)),
                source=str(_first(row, origin, source.path)),
            )
        )
    if not questions:
        raise UserError(f"data source {table.path}: it has no rows")
    return questions


def _columns(table: _Table, role: str, override: str | None, usual: Sequence[str]) -> tuple[str, ...]:
    """Names to try in order, as the table spells them: the one asked for, or the usual ones that exist."""
    if override is not None:
        if override not in table.columns and override.split(".")[0] not in table.columns:
            raise UserError(
                f"data source {table.path}: {role}_column {override!r} does not exist; "
                f"columns are {', '.join(table.columns)}"
            )
        return (override,)
    spelled = {column.lower(): column for column in table.columns}
    split = [name.split(".") for name in usual]
    return tuple(".".join([spelled[head], *rest]) for head, *rest in split if head in spelled)


def _first(row: Mapping[str, Any], columns: Iterable[str], default: Any = None) -> Any:
    """First value that is there and not null; NaN counts as null."""
    for column in columns:
        value: Any = row.get(column)
        if value is None and "." in column:
            value = row
            for part in column.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value
    return default


def _messages(value: Any, where: str, hint: str) -> list[Message]:
    """Chat messages ending in the user's; a plain text is one user message."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a text or a list of chat messages, found {value!r:.80}{hint}")
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise UserError(f"{where}: a chat message needs content and a role ({', '.join(ROLES)}): {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message content must be text, found {message.get('content')!r:.80}")
    if value[-1]["role"] != "user" or not value[-1]["content"].strip():
        raise UserError(f"{where}: the last message must be the user's and not be empty, found {value[-1]!r:.80}{hint}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _answer(value: Any) -> str | None:
    """The reference as text: GSM8K's `#### 72` is cut out, a list of one is that one, other structures stay JSON."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return text.rpartition("####")[2].strip() or None


def _unique(ids: Iterable[str]) -> list[str]:
    taken: set[str] = set()
    count: dict[str, int] = {}
    result = []
    for base in ids:
        candidate = base
        while candidate in taken:
            count[base] = count.get(base, 1) + 1
            candidate = f"{base}#{count[base]}"
        taken.add(candidate)
        result.append(candidate)
    return result


# Template and tokenizer.


def _check_template_settings(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    if not data.chat_template:
        if data.system_prompt is not None or data.chat_template_kwargs:
            raise UserError(
                "data.chat_template=false ignores data.system_prompt and data.chat_template_kwargs; "
                "unset them or set data.chat_template=true"
            )
        return
    if not tokenizer.chat_template:
        raise UserError(
            f"data.chat_template=true: the tokenizer {tokenizer.name_or_path} has no chat template; use an "
            "instruction-tuned checkpoint or set data.chat_template=false"
        )
    for key in RESERVED_TEMPLATE_KWARGS:
        if key in data.chat_template_kwargs:
            raise UserError(f"data.chat_template_kwargs.{key}: set by the loader itself; remove it")


def _conversation(question: _Question, data: DataConfig) -> list[Message]:
    messages = question.messages
    if not data.chat_template and len(messages) > 1:
        raise UserError(f"{question.where}: {len(messages)} messages, but data.chat_template=false allows only one")
    if data.system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    return [*messages[:-1], {"role": "user", "content": messages[-1]["content"] + data.prompt_suffix}]


def _tokenize(
    conversations: list[list[Message]],
    questions: list[_Question],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
) -> list[list[int]]:
    if not data.chat_template:
        # The tokenizer warns of texts beyond its own maximum; ours is checked by the caller.
        return tokenizer([messages[-1]["content"] for messages in conversations], verbose=False)["input_ids"]
    from jinja2 import TemplateError

    texts = []
    for question, messages in zip(questions, conversations, strict=True):
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **data.chat_template_kwargs
            )
        except TemplateError as error:
            raise UserError(f"{question.where}: the tokenizer's chat template refuses the prompt ({error})") from error
        texts.append(text)
    # The template writes special tokens itself.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
