"""Sources of every kind become prompts; bad input is named."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tcopd_fast.config_sections import DataConfig, PromptSourceConfig
from tcopd_fast.data import PromptSet, load_eval_sets, load_prompts
from tcopd_fast.errors import UserError
from tcopd_fast.types import Prompt

TEMPLATE = (
    "{% if banner %}{{ banner }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; plain text gets a leading ~, as a beginning-of-sequence token."""
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<unk>": 95}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="~ $A", special_tokens=[("~", vocabulary["~"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", model_max_length=16)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load(tokenizer, *sources, **settings) -> PromptSet:
    configs = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    parsed = [PromptSourceConfig(**config) for config in configs]
    return load_prompts(parsed, tokenizer, DataConfig(train=parsed, **settings))


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(tokenizer, prompt: Prompt) -> str:
    return tokenizer.decode(list(prompt.token_ids))


def verl_rows() -> list[dict]:
    return [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"Add {i} and 1."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"index": 10 + i, "opd_teacher": "math" if i else "code"},
        }
        for i in range(3)
    ]


PLAIN_ROWS = [
    {"id": "a", "problem": "What is 2+3?", "answer": "5", "solution": "It is \\boxed{6}."},
    {"id": "b", "problem": "What is 2*3?", "answer": "6", "solution": "It is \\boxed{7}."},
]


def test_verl_columns(tokenizer, tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(verl_rows()), path)
    prompts = load(tokenizer, path).prompts
    assert [p.id for p in prompts] == ["10", "11", "12"]
    assert [p.domain for p in prompts] == ["code", "math", "math"]
    assert [p.answer for p in prompts] == ["1", "2", "3"]
    assert {p.source for p in prompts} == {"sums"}
    assert prompts[1].problem == "Add 1 and 1."
    assert text_of(tokenizer, prompts[1]) == "<user>Add 1 and 1.</user><assistant>"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "final_answer": "\\frac{1}{2}", "r1_solution_1": "long"}, "\\frac{1}{2}"),
        ({"id": 0, "problem": "q", "solution": "work \\boxed{1}", "answer": "204", "url": "u"}, "204"),
        ({"question": "q", "answer": "70"}, "70"),
        ({"question": "q", "answer": 70}, "70"),
        ({"question": "q", "answer": "2 apples and 3 make <<2+3=5>>5\n#### 5"}, "5"),
        ({"ID": "x", "Problem": "q", "Answer": "33"}, "33"),
        ({"prompt": "q", "solution": "34"}, "34"),
        ({"problem": "q", "answer": None, "solution": "\\boxed{3}"}, "\\boxed{3}"),
        ({"prompt": "q", "reward_model": {"ground_truth": ["12"]}}, "12"),
        ({"prompt": "q", "reward_model": {"ground_truth": {"inputs": ["1"]}}}, '{"inputs": ["1"]}'),
        ({"problem": "q", "answer": ""}, None),
        ({"problem": "q", "answer": float("nan")}, None),
        ({"problem": "q"}, None),
    ],
)
def test_answer_columns(tokenizer, tmp_path, row, answer):
    (prompt,) = load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row])).prompts
    assert prompt.answer == answer
    assert prompt.problem == "q"


@pytest.mark.parametrize(
    "kind", ["jsonl", "json list", "parquet", "parquet folder", "jsonl folder", "saved", "saved dict"]
)
def test_every_kind_of_source_gives_the_same_prompts(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    dataset = datasets.Dataset.from_list(PLAIN_ROWS)
    path = folder
    if kind == "jsonl":
        path = write_jsonl(folder / "rows.jsonl", PLAIN_ROWS)
    elif kind == "json list":
        path = folder / "rows.json"
        path.write_text(json.dumps(PLAIN_ROWS, indent=1))
    elif kind == "parquet":
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(PLAIN_ROWS), path)
    elif kind == "parquet folder":
        pq.write_table(pa.Table.from_pylist(PLAIN_ROWS), folder / "train-00000-of-00001.parquet")
    elif kind == "jsonl folder":
        write_jsonl(folder / "train.jsonl", PLAIN_ROWS)
    elif kind == "saved":
        dataset.save_to_disk(str(folder))
    else:
        datasets.DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(str(folder))
    prompts = load(tokenizer, path).prompts
    assert [(p.id, p.problem, p.answer, p.domain) for p in prompts] == [
        ("a", "What is 2+3?", "5", "default"),
        ("b", "What is 2*3?", "6", "default"),
    ]


def test_split_name_and_unknown_split(tokenizer, tmp_path):
    dataset = datasets.Dataset.from_list(PLAIN_ROWS)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(str(tmp_path / "d"))
    assert [p.id for p in load(tokenizer, {"path": str(tmp_path / "d"), "split": "test"}).prompts] == ["b"]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        load(tokenizer, {"path": str(tmp_path / "d"), "split": "dev"})


def test_column_overrides_and_domains(tokenizer, tmp_path):
    rows = [
        {"problem": "wrong", "q": {"text": "right"}, "answer": "wrong", "a": "5", "domain": "x", "field": "algebra"},
        {"problem": "wrong", "q": {"text": "right"}, "answer": "wrong", "a": "6", "domain": "y", "field": "sets"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"path": str(path), "prompt_column": "q.text", "answer_column": "a", "domain_column": "field"}
    prompts = load(tokenizer, source).prompts
    assert [(p.problem, p.answer, p.domain) for p in prompts] == [("right", "5", "algebra"), ("right", "6", "sets")]
    assert [p.domain for p in load(tokenizer, path).prompts] == ["x", "y"]
    assert [p.domain for p in load(tokenizer, {"path": str(path), "domain": "all"}).prompts] == ["all", "all"]
    assert len(load(tokenizer, {"path": str(path), "limit": 1}).prompts) == 1


def test_system_prompt_suffix_and_template_arguments(tokenizer, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "one"}]},
        {
            "prompt": [
                {"role": "system", "content": "own"},
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1"},
                {"role": "user", "content": "two"},
            ]
        },
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prompts = load(
        tokenizer, path, system_prompt="Be brief.", prompt_suffix=" Box it.", chat_template_kwargs={"banner": "[B]"}
    ).prompts
    assert [text_of(tokenizer, p) for p in prompts] == [
        "[B]<system>Be brief.</system><user>one Box it.</user><assistant>",
        "[B]<system>own</system><user>q1</user><assistant>a1</assistant><user>two Box it.</user><assistant>",
    ]
    assert [p.problem for p in prompts] == ["one", "two"]


def test_without_chat_template(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", PLAIN_ROWS)
    first = load(tokenizer, path, chat_template=False, prompt_suffix=" =").prompts[0]
    assert text_of(tokenizer, first) == "~What is 2+3? ="
    with pytest.raises(UserError, match=r"ignores data.system_prompt"):
        load(tokenizer, path, chat_template=False, system_prompt="x")
    chat = write_jsonl(
        tmp_path / "chat.jsonl", [{"prompt": [{"role": "system", "content": "s"}, *verl_rows()[0]["prompt"]]}]
    )
    with pytest.raises(UserError, match=r"chat.jsonl, row 1: 2 messages"):
        load(tokenizer, chat, chat_template=False)


def test_overlong_prompts_are_dropped_or_refused(tokenizer, tmp_path):
    rows = [{"id": "short", "problem": "x" * 10}, {"id": "long", "problem": "x" * 11}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    fits = len("<user></user><assistant>") + 10
    kept = load(tokenizer, path, max_prompt_tokens=fits)
    assert [p.id for p in kept.prompts] == ["short"]
    assert kept.dropped_overlong == 1
    with pytest.raises(UserError, match=f"row 2: prompt 'long' has {fits + 1} tokens.*is {fits}"):
        load(tokenizer, path, max_prompt_tokens=fits, overlong="refuse")
    with pytest.raises(UserError, match=r"all 2 prompts .* longer than data.max_prompt_tokens=5"):
        load(tokenizer, path, max_prompt_tokens=5)


def test_ids_are_unique_over_all_sources(tokenizer, tmp_path):
    first = write_jsonl(tmp_path / "1.jsonl", [{"id": "a", "problem": "p"}, {"id": "a#2", "problem": "p"}])
    second = write_jsonl(tmp_path / "2.jsonl", [{"id": "a", "problem": "p"}, {"id": "a", "problem": "p"}])
    ids = [p.id for p in load(tokenizer, first, second).prompts]
    assert ids == ["a", "a#2", "a#3", "a#4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ('{"text": "x"}\n', r"no prompt column found \(it has text\); set the source's prompt_column"),
        ('{"problem": "x"}\n\n{"problem": \n', r"row 3: not valid JSON"),
        ('{"problem": "x"}\n[1]\n', r"row 2: expected a JSON object, found list"),
        (
            '{"problem": "x", "k": 1}\n{"problem": null}\n',
            r"row 2, column 'problem'.*found None; columns are problem, k",
        ),
        ('{"problem": "  "}\n', r"row 1, column 'problem': .*not be empty"),
        ('{"prompt": []}\n', r"row 1, column 'prompt'"),
        ('{"prompt": [{"role": "human", "content": "x"}]}\n', r"row 1.*role \(system, user, assistant, tool\)"),
        ('{"prompt": [{"role": "user", "content": 3}]}\n', r"row 1.*content must be text, found 3"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}\n', r"row 1.*last message must be the user's"),
        (
            '{"prompt": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}]}\n',
            r"row 1: the tokenizer's chat template refuses the prompt \(no tools here\)",
        ),
    ],
)
def test_bad_rows_are_named(tokenizer, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(tokenizer, path)
    assert "bad.jsonl" in str(caught.value)


def test_bad_sources_are_named(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", PLAIN_ROWS)
    for column in ("prompt_column", "answer_column", "domain_column"):
        with pytest.raises(
            UserError, match=f"{column} 'nope' does not exist; columns are id, problem, answer, solution"
        ):
            load(tokenizer, {"path": str(path), column: "nope"})
    with pytest.raises(UserError, match=r"row 2: column 'kind' has no value; columns are problem, kind"):
        load(
            tokenizer,
            {
                "path": str(write_jsonl(tmp_path / "d.jsonl", [{"problem": "x", "kind": "k"}, {"problem": "x"}])),
                "domain_column": "kind",
            },
        )
    for missing in ("gone.jsonl", "./gone", str(tmp_path / "gone"), "data/gone.parquet"):
        with pytest.raises(UserError, match="no such file or folder"):
            load(tokenizer, missing)
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"broken.parquet: not a readable parquet file"):
        load(tokenizer, tmp_path / "broken.parquet")
    (tmp_path / "rows.csv").write_text("problem\nx\n")
    with pytest.raises(UserError, match=r"unknown file type '.csv'"):
        load(tokenizer, tmp_path / "rows.csv")
    with pytest.raises(UserError, match="miniature:nope: no such asset"):
        load(tokenizer, "miniature:nope")


def test_hub_failure_is_one_message(tokenizer, monkeypatch):
    def unreachable(path, name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"someone/sums \(name main, split test\).*doesn't exist.*downloaded copy"):
        load(tokenizer, {"path": "someone/sums", "name": "main", "split": "test"})


def test_hub_id_name_and_split_reach_the_library(tokenizer, monkeypatch):
    seen = []

    def load_dataset(path, name, split):
        seen.append((path, name, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "70"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (prompt,) = load(tokenizer, {"path": "someone/sums", "name": "part-I", "split": "test"}).prompts
    assert seen == [("someone/sums", "part-I", "test")]
    assert (prompt.answer, prompt.id, prompt.source) == ("70", "0", "someone/sums")


def test_tokenizer_without_chat_template(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", PLAIN_ROWS)
    with pytest.raises(UserError, match=r"chat_template_kwargs\.tokenize"):
        load(tokenizer, path, chat_template_kwargs={"tokenize": False})
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template; use an instruction-tuned checkpoint"):
        load(tokenizer, path)


def test_evaluation_sets_need_answers_and_names_of_their_own(tokenizer, tmp_path):
    data = DataConfig(train=[{"path": "unused"}], chat_template=False)
    good = write_jsonl(tmp_path / "good.jsonl", [{"problem": "1", "answer": "2"}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"problem": "1", "answer": "2"}, {"problem": "3"}])
    twin = write_jsonl(tmp_path / "good.json", [{"problem": "1", "answer": "2"}])

    def sources(*paths):
        return [PromptSourceConfig(path=str(path)) for path in paths]

    assert list(load_eval_sets(sources(good), tokenizer, data)) == ["good"]
    with pytest.raises(UserError, match=r"bad\.jsonl: 1 of 2 problems have no reference answer"):
        load_eval_sets(sources(good, bad), tokenizer, data)
    with pytest.raises(UserError, match=r"good\.json: a second set named 'good'"):
        load_eval_sets(sources(good, twin), tokenizer, data)
    named = [*sources(good), PromptSourceConfig(path=str(twin), name="second")]
    assert list(load_eval_sets(named, tokenizer, data)) == ["good", "second"]
