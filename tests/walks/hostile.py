"""Cases of strangers' files and names, each a folder and a command line that must be refused, or do no harm."""

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.tiny_models import build_tiny_model

MEMBER = 50_000_000  # bytes of a stream, of which an archive holds many one after another
ZEROS = 4_000_000_000  # bytes that an archive of a few megabytes unpacks to


@dataclass(frozen=True)
class Case:
    """One try.

    Attributes:
        prepare: fills the folder in which the command line runs; `../base` and `../rows.jsonl` are there.
        words: of the command line.
        is_harmless: the line may succeed as well, as long as nothing happens beyond it.
    """

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    is_harmless: bool = False


_SLOW = {"Regex": "([a-z]+)+$"}
SLOW_SPLIT = {"type": "Split", "pattern": _SLOW, "behavior": "Isolated", "invert": False}
SLOW_REPLACE = {"type": "Replace", "pattern": _SLOW, "content": "x" * 1000}


def workshop(folder: Path) -> None:
    """`base/`, `rows.jsonl` and `held_out.jsonl` beside the folders of the cases."""
    build_tiny_model("llama", folder / "base")
    for name, word in (("rows", "lamp"), ("held_out", "door")):
        turns = [
            [{"role": "user", "content": f"{word} {number}"}, {"role": "assistant", "content": f"on {number}"}]
            for number in range(12)
        ]
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


TRAIN = (
    *("model.source=../base", "data.train_file=../rows.jsonl", "data.max_tokens=256", "trainer.max_steps=1"),
    *("trainer.batch_size=2", "quant.compute_dtype=float32"),
)
SOURCE = ("train", "data=rows", *TRAIN)
EXPERIMENT = ("train", "experiment=x", "data=rows", *TRAIN)
INSPECT = ("inspect", "data=rows", "data.max_tokens=256")


def cases() -> Iterator[Case]:
    """All of them, in the same order every time."""
    yield from _code_in_recipes()
    yield from _recipes_that_grow()
    yield from _templates()
    yield from _archives()
    yield from _links()
    yield from _names()
    yield from _headers()
    yield from _rows()


def _experiment(body: str, path: str = "recipes/experiment/x.yaml") -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(body, encoding="utf-8")

    return prepare


PAYLOADS = {
    "spawn": "{_target_: distutils.spawn.spawn, cmd: [touch, owned]}",
    "popen": "{_target_: subprocess.Popen, args: [touch, owned]}",
    "system": "{_target_: os.system, command: touch owned}",
    "exec": '{_target_: builtins.exec, object: \'open("owned", "w")\'}',
    "open": "{_target_: builtins.open, file: owned, mode: w}",
    "torch": "{_target_: torch.load, f: evil.pt, weights_only: false}",
    "pickle": "{_target_: pandas.read_pickle, filepath_or_buffer: evil.pkl}",
    "hub": "{_target_: transformers.AutoConfig.from_pretrained, pretrained_model_name_or_path: evil, "
    "trust_remote_code: true}",
    "write": "{_target_: qlora_kit.core.files.write_text, path: owned, text: x}",
    "runpy": "{_target_: runpy.run_path, path_name: evil.py}",
    "import": "{_target_: importlib.import_module, name: evil}",
    "path": "{_target_: pathlib.Path.touch, self: owned}",
    "method": "{_target_: hydra.utils.get_method, path: os.system}",
    "callback": "{_target_: hydra.experimental.callbacks.PickleJobInfoCallback}",
}
# Where a payload can stand in Hydra's own section and in the recipe
PLACES = {
    "callbacks": "hydra:\n  callbacks:\n    x: {payload}\n",
    "launcher": "hydra:\n  launcher: {payload}\n",
    "sweeper": "hydra:\n  sweeper: {payload}\n",
    "handler": "hydra:\n  job_logging:\n    version: 1\n    handlers:\n"
    "      x: {{'()': os.system, command: touch owned}}\n    root: {{handlers: [x]}}\n# {payload}\n",
    "formatter": "hydra:\n  hydra_logging:\n    version: 1\n    formatters:\n"
    "      x: {{'()': os.system, command: touch owned}}\n# {payload}\n",
    "data": "data:\n  columns: {payload}\n",
    "model": "model: {payload}\n",
    "root": "x: {payload}\n",
}
HEADER = "# @package _global_\n"


def _code_in_recipes() -> Iterator[Case]:
    for place, text in PLACES.items():
        for payload, body in PAYLOADS.items():
            if place in ("handler", "formatter") and payload != "system":
                continue
            yaml = HEADER + text.format(payload=body)
            yield Case(f"code-{place}-{payload}", EXPERIMENT, _experiment(yaml))
    for payload in ("spawn", "write", "open"):
        shadow = "# @package _global_\n" + PLACES["callbacks"].format(payload=PAYLOADS[payload])
        yield Case(f"code-shadowed-trainer-{payload}", SOURCE, _experiment(shadow, "recipes/trainer/default.yaml"))
        yield Case(f"code-shadowed-train-{payload}", SOURCE, _experiment(shadow, "recipes/train.yaml"), True)
        yield Case(f"code-sweep-{payload}", ("train", "-m", *EXPERIMENT[1:], "lora.r=2,4"), _experiment(shadow))
        yield Case(f"code-run-{payload}", ("train", "resume=run"), _experiment(shadow, "run/recipe.yaml"))
        yield Case(f"code-export-{payload}", ("export", "run=run", "export=gguf_q8_0"), _run_of(shadow))
    settings = {
        "env_set": "hydra:\n  job:\n    env_set: {LD_PRELOAD: ./evil.so}\n",
        "env_copy": "hydra:\n  job:\n    env_copy: [HF_TOKEN]\n",
        "run_dir": "hydra:\n  run:\n    dir: ../escaped\n",
        "sweep_dir": "hydra:\n  sweep:\n    dir: ../escaped\n",
        "subdir": "hydra:\n  output_subdir: ../../../escaped\n",
        "searchpath": "hydra:\n  searchpath: ['file://../escaped']\n",
        "searchpath_pkg": "hydra:\n  searchpath: ['pkg://antigravity']\n",
        "chdir": "hydra:\n  job:\n    chdir: true\n",
        "name": "hydra:\n  job:\n    name: ../../escaped\n",
        "help": "hydra:\n  help:\n    template: ${oc.env:HOME}\n",
        "tag": "name: !!python/object/apply:os.system ['touch owned']\n",
        "tag_new": "name: !!python/object/new:os.system ['touch owned']\n",
        "tag_module": "name: !!python/module:antigravity\n",
        "env": "data:\n  columns: {prompt: '${oc.env:HOME}'}\n",
        "env_name": "name: ${oc.env:USER,nobody}\n",
        "decode": "name: \"${oc.decode:'{a: 1}'}\"\n",
        "create": "name: '${oc.create:{a: 1}}'\n",
        "select": "name: ${oc.select:hydra.runtime.cwd}\n",
        "now": "name: ${now:%Y}\n",
        "hydra": "name: ${hydra:runtime.cwd}\n",
        "python_version": "name: ${python_version:}\n",
        "unknown": "name: ${evil:1}\n",
        "loop": "name: ${name}\n",
        "loops": "name: ${model.source}\nmodel:\n  source: ${name}\n",
        "defaults_up": "defaults:\n  - ../../../../../../../etc/passwd\n",
        "defaults_pkg": "defaults:\n  - pkg://os@x: y\n",
        "defaults_self": "defaults:\n  - x\n",
        "defaults_list": "defaults: 5\n",
        "defaults_hydra": "defaults:\n  - override /hydra/launcher: submitit_local\n",
    }
    for name, body in settings.items():
        # Of the harmless: a name that no file is written to, and a launcher of the list in a run that launches nothing
        is_harmless = name in ("now", "select", "name", "defaults_hydra")
        yield Case(f"setting-{name}", EXPERIMENT, _experiment(HEADER + body), is_harmless)


def _run_of(recipe: str) -> Callable[[Path], None]:
    """A run folder of a stranger that looks finished."""

    def prepare(folder: Path) -> None:
        run = folder / "run"
        (run / "adapter").mkdir(parents=True)
        (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
        (run / "result.json").write_text("{}", encoding="utf-8")
        (run / "data.json").write_text("{}", encoding="utf-8")
        (run / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")

    return prepare


def _recipes_that_grow() -> Iterator[Case]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    bombs = {
        "aliases": "\n".join(lines),
        "deep_lists": "name: " + "[" * 100_000,
        "deep_maps": "name: " + "{a: " * 20_000 + "1" + "}" * 20_000,
        "deep_blocks": "\n".join("  " * n + f"k{n}:" for n in range(3000)),
        "long": "name: " + "x" * 30_000_000,
        "keys": "\n".join(f"k{n}: 1" for n in range(300_000)),
        "merge": "a: &a {b: 1}\n" + "\n".join(f"k{n}: {{<<: *a}}" for n in range(50_000)),
        "number": "trainer:\n  max_steps: 1" + "0" * 400,
        "float": "trainer:\n  epochs: 1e300\n",
        "infinity": "optim:\n  learning_rate: .inf\n",
        "nan": "optim:\n  learning_rate: .nan\n",
        "seed": "trainer:\n  seed: 99999999999999999999\n",
        "negative": "trainer:\n  batch_size: -5\n",
        "huge_batch": "trainer:\n  batch_size: 1000000000000\n",
        "huge_rank": "lora:\n  r: 1000000000000\n",
        "control": 'name: "a\\x1b[2Jb"\n',
        "not_utf8": "name: \udcff\n",
        "binary": "\x00\x01\x02",
        "empty": "",
        "list": "- a\n- b\n",
        "scalar": "x",
        "duplicate": "name: a\nname: b\n",
        "tab": "name:\t\tx\n\ty: 1\n",
    }
    for name, body in bombs.items():

        def prepare(folder: Path, body: str = body) -> None:
            place = folder / "recipes/experiment/x.yaml"
            place.parent.mkdir(parents=True)
            place.write_bytes((HEADER + body).encode("utf-8", "surrogateescape"))

        yield Case(f"recipe-{name}", EXPERIMENT, prepare, is_harmless=name in ("empty", "duplicate"))
        if name in ("aliases", "deep_lists", "deep_maps", "long", "number", "float", "binary", "list"):

            def as_run(folder: Path, body: str = body) -> None:
                (folder / "run").mkdir()
                (folder / "run/recipe.yaml").write_bytes(body.encode("utf-8", "surrogateescape"))

            yield Case(f"run-recipe-{name}", ("train", "resume=run"), as_run)


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops_of_three": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "list": "{{ range(10**9)|list }}",
    "power": "{{ (10**100000)**1000 }}",
    "power_chain": "{{ 9**9**9**9 }}",
    "times": "{{ 'a'*10**10 }}",
    "times_list": "{{ ([0]*10**9)|length }}",
    "times_twice": "{{ ('a'*10**6)*10**6 }}",
    "indent": "{{ messages|tojson(indent=10**9) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format_method": "{{ '{:>10000000000}'.format(1) }}",
    "format_filter": "{{ '%*d'|format(10**10, 1) }}",
    "join": "{{ range(10**8)|join('xxxxxxxxxx') }}",
    "batch": "{{ range(10**9)|batch(2)|list }}",
    "replace": "{{ ('a'*100000).replace('a', 'b'*100000) }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    "{{ ns.x }}",
    "doubling_list": "{% set ns = namespace(x=[0]) %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive_loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "call": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% call m() %}x{% endcall %}{% endcall %}",
    "deep_parens": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep_lists": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "deep_ifs": "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
    "long_sum": "{{ " + "+".join(["1"] * 20000) + " }}",
    "unclosed": "{% for x in messages %}",
    "unknown_tag": "{% evil %}",
    "syntax": "{{ 1 + }}",
    "globals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "import_file": "{% import '/etc/passwd' as x %}",
    "division": "{{ 1 // 0 }}",
    "undefined": "{{ nothing.at.all }}",
    "raise": "{{ raise_exception('\x1b]0;owned\x07\x1b[2J') }}",
    "escape": "{% for m in messages %}\x1b[2J{{ m.content }}{% endfor %}",
    "nothing": "",
    "endless_output": "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "sort": "{{ range(10**8)|sort|length }}",
    "map": "{{ range(10**9)|map('string')|list|length }}",
    "strftime": "{{ strftime_now('%' * 1000000) }}",
    "wordwrap": "{{ ('a '*10**7)|wordwrap(1)|length }}",
    "pprint": "{{ range(10**7)|list|pprint|length }}",
    "urlize": "{{ ('(' * 10**6)|urlize }}",
    "striptags": "{{ ('<' * 10**6)|striptags }}",
    "int": "{{ ('9' * 10**6)|int }}",
    "not_text": "\x00\x01",
}


def _templates() -> Iterator[Case]:
    for name, text in TEMPLATES.items():

        def beside(folder: Path, text: str = text) -> None:
            (folder / "t.jinja").write_text(text, encoding="utf-8")

        words = (*INSPECT, "model.source=../base", "data.train_file=../rows.jsonl", "model.chat_template=t.jinja")
        yield Case(f"template-{name}", words, beside, is_harmless=True)
    for name in (
        "loops",
        "power",
        "times",
        "doubling",
        "macro",
        "import",
        "deep_parens",
        "syntax",
        "raise",
        "undefined",
    ):

        def inside(folder: Path, text: str = TEMPLATES[name]) -> None:
            _copied_base(folder)
            (folder / "base" / "chat_template.jinja").write_text(text, encoding="utf-8")

        trained = ("train", "data=rows", "model.source=base", *TRAIN[1:])
        yield Case(f"base-template-{name}", trained, inside, is_harmless=True)


def _copied_base(folder: Path) -> None:
    """A base of the case's own, whose weights are links to the shared ones."""
    (folder / "base").mkdir()
    for file in (folder.parent / "base").iterdir():
        place = folder / "base" / file.name
        if file.suffix == ".safetensors":
            place.hardlink_to(file)
        else:
            place.write_bytes(file.read_bytes())


def _archives() -> Iterator[Case]:
    heads = {
        "line": b'{"messages": [{"role": "user", "content": "',
        "zeros": b"",
        "list": b"[",
        "brackets": b"[" * 100_000,
    }
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for kind in ("jsonl", "json", "csv"):
        for head, start in heads.items():
            for suffix in tuple(packers) if (head, kind) == ("line", "jsonl") else ("gz",):

                def prepare(folder: Path, start: bytes = start, suffix: str = suffix, kind: str = kind) -> None:
                    pack = packers[suffix]
                    member = pack(b"0" * MEMBER)
                    with (folder / f"rows.{kind}.{suffix}").open("wb") as stream:
                        stream.write(pack(start))
                        for _ in range(ZEROS // MEMBER):
                            stream.write(member)

                words = (*INSPECT, "model.source=../base", f"data.train_file=rows.{kind}.{suffix}")
                yield Case(f"archive-{kind}-{head}-{suffix}", words, prepare)

    def parquet(folder: Path, kind: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if kind == "long_value":
            table = pa.table({"text": pa.array(["x" * 500_000_000], pa.large_string())})
        elif kind == "dictionary":
            one = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int32()), pa.array(["x" * 100_000]))
            table = pa.table({"text": one})
        else:
            table = pa.table({"text": pa.array([None] * 200_000_000, pa.null())})
        pq.write_table(table, folder / "rows.parquet", compression="zstd", write_statistics=False)

    for kind in ("long_value", "dictionary", "nulls"):
        of_text = (*INSPECT, "model.source=../base", "data.train_file=rows.parquet", "data.format=text")
        yield Case(f"archive-parquet-{kind}", of_text, partial(parquet, kind=kind))


def _links() -> Iterator[Case]:
    """Run folders with links that lead out of them."""
    places = (
        "exports",
        "exports/.merged.dequantized",
        "exports/.merged.original",
        "exports/gguf_q8_0",
        "exports/merged_16bit",
        "adapter",
        "checkpoints",
        "checkpoints/checkpoint-1",
        "metrics.jsonl",
        "recipe.yaml",
        "data.json",
        "result.json",
        "eval.json",
        "report.html",
        "environment.json",
        "overrides.txt",
    )
    verbs = {
        "export": ("export", "run=run", "export=gguf_q8_0"),
        "eval": ("eval", "run=run"),
        "report": ("report", "run=run"),
        "resume": ("train", "resume=run"),
    }
    for place in places:
        for verb, words in verbs.items():

            def prepare(folder: Path, place: str = place, verb: str = verb) -> None:
                import shutil

                source = folder.parent / ("finished" if verb != "resume" else "stopped")
                shutil.copytree(source, folder / "run")
                target = folder.parent / "outside" / place.replace("/", "_")
                link = folder / "run" / place
                link.parent.mkdir(parents=True, exist_ok=True)
                if link.is_dir():
                    shutil.rmtree(link)
                else:
                    link.unlink(missing_ok=True)
                link.symlink_to(target, target_is_directory=target.is_dir())

            yield Case(f"link-{place.replace('/', '_')}-{verb}", words, prepare, is_harmless=True)


def _names() -> Iterator[Case]:
    names = (
        *("../evil", "/tmp/evil", "..", ".", "a/../../evil", "a/b/c", ".hidden", "a\nb", "a\x1b[2J", "x" * 300),
        *(
            "$(touch owned)",
            "`touch owned`",
            "a;touch owned",
            "-rf",
            "a b",
            "it's",
            '"',
            "é漢",
            "<script>",
            "${oc.env:HOME}",
        ),
    )
    for name in names:
        quoted = "'" + name.replace("'", "\\'") + "'"
        yield Case(f"name-{name[:20]!r}", (*SOURCE, f"name={quoted}"), is_harmless=True)
    for key in ("hydra.run.dir", "hydra.output_subdir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        for value in ("../escaped", "/proc/escaped", "a/../../../escaped"):
            yield Case(f"line-{key}-{value}", (*SOURCE, f"{key}={value}"), is_harmless=True)
    for word in (
        "hydra.job.chdir=true",
        "+hydra.job.env_set.HF_TOKEN=secret-value",
        "hydra.searchpath=[pkg://antigravity]",
    ):
        yield Case(f"line-{word}", (*SOURCE, word), is_harmless=True)
    for word in ("data.train_file=/dev/zero", "data.train_file=/dev/stdin", "data.train_file=/proc/self/mem"):
        yield Case(f"line-{word}", (*INSPECT, "model.source=../base", word))
    for word in ("model.source=/dev/zero", "model.source=/proc/self", "model.source=..", "model.source=~nobody/x"):
        yield Case(f"line-{word}", (*INSPECT, "data.train_file=../rows.jsonl", word))


def _headers() -> Iterator[Case]:
    """Bases whose files are damaged or lie."""
    words = ("train", "data=rows", "model.source=base", *TRAIN[1:])

    def weights(head: bytes) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            _copied_base(folder)
            (file,) = (folder / "base").glob("*.safetensors")
            file.unlink()
            file.write_bytes(head)

        return prepare

    def header(value: object) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text

    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    heads = {
        "empty": b"",
        "short": b"\x01\x02",
        "2_60": struct.pack("<Q", 2**60) + b"{}",
        "2_63": struct.pack("<Q", 2**63) + b"{}",
        "all_ones": b"\xff" * 64,
        "list": header([1, 2]),
        "number": header(5),
        "text": struct.pack("<Q", 4) + b"abcd",
        "entry_list": header({"w": [1]}),
        "entry_number": header({"w": 5}),
        "no_shape": header({"w": {"dtype": "F32", "data_offsets": [0, 4]}}),
        "negative": header({"w": {**entry, "shape": [-1, 4]}}),
        "huge_shape": header({"w": {**entry, "shape": [2**62, 2**62]}}),
        "offsets": header({"w": {**entry, "data_offsets": [5, 1]}}),
        "past_end": header({"w": {**entry, "data_offsets": [0, 2**50]}}),
        "dtype": header({"w": {**entry, "dtype": "EVIL"}}),
        "names": header({"\x1b[2J" * 10: entry}),
        "many": header({f"t{n}": entry for n in range(100_000)}),
        "pickle": b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.",
        "zip": b"PK\x03\x04" + b"\x00" * 100,
    }
    for name, head in heads.items():
        yield Case(f"weights-{name}", words, weights(head))
    files = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
    values = {
        "empty": b"",
        "list": b"[]",
        "number": b"5",
        "null": b"null",
        "deep": b"[" * 100_000,
        "not_utf8": b"\xff\xfe{",
        "cut": b'{"model_type": "lla',
        "huge": b'{"a": 1' + b"0" * 5_000_000 + b"}",
    }
    for file in files:
        for name, body in values.items():

            def damaged(folder: Path, file: str = file, body: bytes = body) -> None:
                _copied_base(folder)
                (folder / "base" / file).write_bytes(body)

            yield Case(f"{file}-{name}", words, damaged, is_harmless=True)
    changes: dict[str, tuple[str, object]] = {
        "eos_huge": ("generation_config.json", {"eos_token_id": 10**12}),
        "eos_text": ("generation_config.json", {"eos_token_id": "evil"}),
        "eos_list": ("generation_config.json", {"eos_token_id": [[1]]}),
        "layers_text": ("config.json", {"num_hidden_layers": "many"}),
        "layers_huge": ("config.json", {"num_hidden_layers": 10**9}),
        "hidden_huge": ("config.json", {"hidden_size": 10**9}),
        "hidden_negative": ("config.json", {"hidden_size": -8}),
        "hidden_zero": ("config.json", {"num_attention_heads": 0}),
        "vocabulary_huge": ("config.json", {"vocab_size": 10**12}),
        "vocabulary_small": ("config.json", {"vocab_size": 3}),
        "remote_code": ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}),
        "architecture": ("config.json", {"architectures": ["os.system"]}),
        "model_type": ("config.json", {"model_type": "\x1b[2J"}),
        "quantized": ("config.json", {"quantization_config": {"quant_method": "evil"}}),
        "quantized_list": ("config.json", {"quantization_config": [1]}),
        "attention": ("config.json", {"_attn_implementation": "evil/kernels"}),
        "tokenizer_class": ("tokenizer_config.json", {"tokenizer_class": "os.system", "auto_map": {"x": "evil.Evil"}}),
        "tokens_decoder": ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}),
        "max_length": ("tokenizer_config.json", {"model_max_length": -1}),
        "slow_pattern": ("tokenizer.json", {"pre_tokenizer": SLOW_SPLIT}),
        "slow_normalizer": ("tokenizer.json", {"normalizer": SLOW_REPLACE}),
        "long_replacement": ("tokenizer.json", {"normalizer": SLOW_REPLACE | {"pattern": {"String": ""}}}),
        "unigram": ("tokenizer.json", {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}}),
        "no_model": ("tokenizer.json", {"model": None}),
        "merges": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
        "template_list": ("tokenizer_config.json", {"chat_template": [5]}),
    }
    for name, (file, change) in changes.items():

        def changed(folder: Path, file: str = file, change: object = change) -> None:
            _copied_base(folder)
            place = folder / "base" / file
            value = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
            assert isinstance(change, dict)
            place.write_text(json.dumps(value | change), encoding="utf-8")
            (folder / "base" / "evil.py").write_text("open('owned', 'w')\n", encoding="utf-8")

        yield Case(f"base-{name}", words, changed, is_harmless=True)


def _rows() -> Iterator[Case]:
    values: dict[str, str] = {
        "escape": json.dumps({"messages": [{"role": "user\x1b]0;owned\x07", "content": "x"}]}),
        "column": json.dumps({"\x1b[2Jprompt": "a", "b": "c"}),
        "part_type": json.dumps({"messages": [{"role": "user", "content": [{"type": [1], "text": "x"}]}]}),
        "turns": json.dumps(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 20_000}
        ),
        "long": json.dumps({"text": "word " * 5_000_000}),
        "deep": '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}",
        "number": '{"text": 1' + "0" * 5_000_000 + "}",
        "nan": '{"text": NaN}',
        "surrogate": '{"text": "\\ud800"}',
        "nul": '{"text": "\\u0000"}',
        "not_json": "\x00\x01\x02",
        "roles": json.dumps({"messages": [{"role": {"a": 1}, "content": "x"}]}),
        "none": json.dumps({"messages": None}),
        "tool": json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"function": "evil"}]}]}),
        "regex": json.dumps({"text": "a" * 200_000 + "!" + "(" * 50_000}),
    }
    for name, row in values.items():

        def prepare(folder: Path, row: str = row) -> None:
            (folder / "rows.jsonl").write_text((row + "\n") * 3, encoding="utf-8", errors="surrogatepass")

        words = (*INSPECT, "model.source=../base", "data.train_file=rows.jsonl")
        yield Case(f"rows-{name}", words, prepare, is_harmless=True)
