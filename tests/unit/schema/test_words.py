"""Every documented form of a value composes, and paths and texts are taken as they were typed."""

import shlex

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.shell import shell_line
from qlora_kit.schema.compose import compose_recipe, compose_unchecked, sweep_jobs, sweep_lines

pytestmark = pytest.mark.slow

LINE = ("model=demo", "data=rows", "data.max_tokens=64")
ROWS = (*LINE, "data.train_file=rows.jsonl")


def composed(*words, verb="train"):
    return compose_unchecked(verb, list(words))


def told(*words, verb="train"):
    with pytest.raises(RecipeError) as caught:
        composed(*words, verb=verb)
    return [(problem.what, problem.where, problem.fix) for problem in caught.value.problems]


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("data", ["rows", "packed", "messages", "alpaca", "prompt_completion"])
def test_names_are_mapped_as_the_documents_say(plus, data):
    recipe = composed(
        *ROWS,
        f"data={data}",
        plus + "data.columns={prompt: question, completion: answer}",
        plus + "data.roles={customer: user, agent: assistant}",
        plus + "lora.rank_pattern={q_proj:8, model.layers.0.v_proj: 4}",
        plus + "lora.alpha_pattern={q_proj:8.5}",
    )
    assert recipe.data.columns == {"prompt": "question", "completion": "answer"}
    assert recipe.data.roles == {"customer": "user", "agent": "assistant"}
    assert recipe.lora.rank_pattern == {"q_proj": 8, "model.layers.0.v_proj": 4}
    assert recipe.lora.alpha_pattern == {"q_proj": 8.5}


def test_sources_of_a_mix_whole_or_field_by_field():
    whole = composed(*LINE, "data.sources={a: {path: x.jsonl, rows: 3}, b: {path: 'ü (1).csv'}}").data.sources
    assert {name: (source.path, source.rows) for name, source in whole.items()} == {
        "a": ("x.jsonl", 3),
        "b": ("ü (1).csv", None),
    }
    parts = composed(
        *LINE, "data.sources.a.path=ü.jsonl", "data.sources.a.rows=3", "data.sources.b.path=y"
    ).data.sources
    assert {name: (source.path, source.rows) for name, source in parts.items()} == {
        "a": ("ü.jsonl", 3),
        "b": ("y", None),
    }


def test_a_mapping_replaces_the_one_before_and_an_entry_joins_it():
    recipe = composed(
        *ROWS, "data.columns={prompt: q, completion: a}", "data.columns={prompt: frage}", "data.columns.system=s"
    )
    assert recipe.data.columns == {"prompt": "frage", "system": "s"}


def test_texts_beyond_hydras_grammar_in_mappings_and_lists():
    recipe = composed(
        *ROWS, "data.columns={prompt: Überschrift (alt), completion: 'a=b'}", "lora.targets=[q_proj, ü#1]"
    )
    assert recipe.data.columns == {"prompt": "Überschrift (alt)", "completion": "a=b"}
    assert recipe.lora.targets == ["q_proj", "ü#1"]


@pytest.mark.parametrize(
    "line",
    [
        "export=gguf_q4_k_m 'export.gguf.gguf_q4_k_m.overrides={blk.*.ffn_down.weight: Q6_K}'",
        "export=gguf_q4_k_m '+export.gguf.gguf_q4_k_m.overrides={blk.*.ffn_down.weight: Q6_K}'",
        "export=gguf_q4_k_m 'export.gguf.gguf_q4_k_m.overrides.blk.*.ffn_down.weight=Q6_K'",
    ],
)
def test_block_types_of_a_gguf_file(line):
    recipe = composed(*shlex.split(line), verb="export")
    assert recipe.export.gguf["gguf_q4_k_m"].overrides == {"blk.*.ffn_down.weight": "Q6_K"}


def test_layers_of_a_gptq_file_and_a_file_of_ones_own():
    words = ("export=gptq_4bit", "export.gptq.gptq_4bit.overrides={*.down_proj:{bits:8}}")
    assert composed(*words, verb="export").export.gptq["gptq_4bit"].overrides["*.down_proj"].bits == 8
    mine = composed("export=gguf_q8_0", "export.gptq={mine: {bits: 3}}", verb="export").export
    assert mine.gptq["mine"].bits == 3 and list(mine.gguf) == ["gguf_q8_0"]


def test_a_misspelled_file_is_not_a_new_one():
    assert told("export=gptq_4bit", "export.gptq.gptq_4bt.group_size=64", verb="export") == [
        (
            "export.gptq holds nothing named 'gptq_4bt'; it holds gptq_4bit",
            "command line: export.gptq.gptq_4bt.group_size=64",
            "export.gptq.gptq_4bit.group_size=64",
        )
    ]


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("data.columns=prompt", "data.columns cannot be 'prompt': it is dict of str, str"),
        ("lora.rank_pattern={q_proj: many}", "lora.rank_pattern cannot be {'q_proj': 'many'}: it is dict of str, int"),
        ("data.sources={a: {pth: x}}", "data.sources cannot be {'a': {'pth': 'x'}}: it is dict of str, SourceConfig"),
    ],
)
def test_a_mapping_of_the_wrong_form_is_told_where_it_was_set(word, what):
    ((said, where, _),) = told(*ROWS, word)
    assert (said, where) == (what, f"command line: {word}")


PATHS = [
    "Fragen & Antworten.jsonl",
    "übung.csv",
    "日本.jsonl",
    "a#b.csv",
    "it's.csv",
    "rows (1).csv",
    "a=b.csv",
    "[1].csv",
    "[a,b]",
    "a,b.csv",
    "{x}.csv",
    "$HOME.csv",
    "${HOME}.csv",
    "${a.csv",
    "1.50",
    "1e3",
    "true",
    "x: y",
    "a\\b",
    '"a',
    "choice(a)",
    "glob(*)",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_as_it_was_typed(path):
    assert composed(*LINE, f"data.train_file={path}").data.train_file == path
    assert composed(*ROWS, f"data.sources.x.path={path}").data.sources["x"].path == path


@pytest.mark.parametrize("path", [*PATHS, "\\${a}", "a\\\\${", "''", "'", "\\", ""])
def test_a_quoted_path_is_the_path(path):
    from qlora_kit.core.shell import override

    assert composed(*LINE, override("data.train_file", path)).data.train_file == path
    (word,) = shlex.split(shell_line([override("data.train_file", path)]))
    assert composed(*LINE, word).data.train_file == path


def test_null_and_quotes_and_references_keep_their_sense():
    assert composed(*LINE, "data.train_file=null").data.train_file is None
    assert composed(*LINE, "data.train_file='a b'").data.train_file == "a b"
    assert composed(*ROWS, "lora.r=8", "lora.alpha=${lora.r}").lora.alpha == 8
    assert composed(*ROWS, "lora.r=8", "name=rank_${lora.r}").name == "rank_8"


def test_words_that_are_no_override():
    for word in ("=3", "a b=3", "x[0]=3", "lora..r=3"):
        ((what, where, fix),) = told(*ROWS, word)
        assert what == f"cannot read '{word}'; an override is group=option or path=value"
        assert (where, fix) == ("the command line", "")


@pytest.mark.parametrize("word", ["lora.r=(", "lora.r=ü", "lora.r='"])
def test_a_number_that_hydra_cannot_read_is_told_as_any_other(word):
    ((what, _, fix),) = told(*ROWS, word)
    assert what.endswith(": it is int") and fix == "lora.r=16"


SWEEP = "; to try each of them in a sweep, add -m to qlora-kit train"


@pytest.mark.parametrize(
    ("word", "what", "fix"),
    [
        ("lora.r=4,8", f"lora.r is given several values, and takes one{SWEEP}", "lora.r=4"),
        (
            "optim.learning_rate=0,0001",
            f"optim.learning_rate is given several values, and takes one{SWEEP}",
            "optim.learning_rate=0.0001",
        ),
        (
            "optim.learning_rate=1e-4,2e-4",
            f"optim.learning_rate is given several values, and takes one{SWEEP}",
            "optim.learning_rate=0.0001",
        ),
        ("lora.r=range(4,8)", f"lora.r is given several values, and takes one{SWEEP}", "lora.r=4"),
        (
            "lora.targets=q_proj,v_proj",
            f"several values of lora.targets stand in brackets{SWEEP}",
            "'lora.targets=[q_proj,v_proj]'",
        ),
        ("optim=adamw,paged_lion_8bit", f"optim is given several values, and takes one{SWEEP}", "optim=adamw"),
        (
            "tracker=mlflow,wandb",
            f"several values of tracker stand in brackets{SWEEP}",
            "'tracker=[mlflow,wandb]'",
        ),
        ("lora.r=interval(4,8)", f"lora.r is given several values, and takes one{SWEEP}", ""),
    ],
)
def test_several_values_without_a_sweep(word, what, fix):
    assert told(*ROWS, word) == [(what, f"command line: {word}", fix)]


def test_several_exports_without_brackets():
    with pytest.raises(RecipeError) as caught:
        compose_recipe("export", ["run=latest", "export=gguf_q4_k_m,gguf_q8_0"])
    (problem,) = caught.value.problems
    assert problem.what == "several values of export stand in brackets"
    assert problem.fix == "'export=[gguf_q4_k_m,gguf_q8_0]'"
    with pytest.raises(RecipeError) as caught:
        compose_recipe("export", ["run=latest", "export=gptq4bit,gguf_q8_0"])
    (problem,) = caught.value.problems
    assert problem.what.startswith("there is no export named 'gptq4bit'; did you mean 'gptq_4bit'?")
    assert problem.fix == "export=[gptq_4bit,gguf_q8_0]"


def test_in_a_sweep_commas_are_choices_and_mappings_stay_whole():
    words = [*LINE, "data.train_file=ü.csv,b (1).csv", "data.columns={prompt: q, completion: a}", "lora.r=4,8"]
    jobs = sweep_jobs(words)
    assert len(jobs) == 4
    assert [composed(*job).data.train_file for job in jobs] == ["ü.csv", "ü.csv", "b (1).csv", "b (1).csv"]
    assert {tuple(composed(*job).data.columns.items()) for job in jobs} == {(("prompt", "q"), ("completion", "a"))}
    assert sweep_lines(words)[-2] == "++data.columns={prompt: q, completion: a}"
