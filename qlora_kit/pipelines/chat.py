"""Chat: a run's adapter or any export, token by token."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from qlora_kit.core.console.lines import log, show
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.shell import shell_line
from qlora_kit.core.verdict import Verdict, recorded_verdict
from qlora_kit.data.conversation import Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from qlora_kit.export.manifest import read_manifest
from qlora_kit.formats.format import Format
from qlora_kit.formats.registry import find_format
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.directory import MANIFEST, RunDirectory, meant_run, newest_run
from qlora_kit.runs.open import open_run

Messages = list[dict[str, str]]


def chat(place: str, message: str | None, max_new_tokens: int) -> None:
    """Answer one message, or talk until the input ends; answers are printed as they come.

    Raises:
        RecipeError: the place is neither a run directory nor an export.
    """
    speaker = _open(place)
    said: Messages = []
    for line in [message] if message is not None else _lines():
        said.append({"role": "user", "content": line})
        answer = ""
        for piece in speaker(said, max_new_tokens):
            show(piece, end="")
            answer += piece
        show("")
        said.append({"role": "assistant", "content": answer})


def refuse_several_places(words: Sequence[str]) -> None:
    """Refuse a line with more than a place: a run and the name of a file of its, or a message without its option.

    Raises:
        RecipeError: with the line that was probably meant.
    """
    if len(words) < 2:
        return
    first, *rest = words
    run = newest_run() if first == "latest" else RunDirectory(Path(first))
    file = run.exports / rest[0] if run is not None and len(rest) == 1 else None
    is_file = file is not None and (file / MANIFEST).is_file()
    told = f"; {rest[0]} is a file of that run" if is_file else "; a message goes behind --message"
    meant = [file] if is_file else [first, "--message", " ".join(rest)]
    what = f"chat takes one place, a run or a folder of its exports, not {len(words)} words"
    raise RecipeError(what + told, "the command line", shell_line(["qlora-kit", "chat", *meant]))


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _open(place: str) -> Any:
    folder = Path(place)
    folder = folder.parent if folder.is_file() else folder
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        _tell_verdict(manifest)
        path = folder / manifest["file"]
        written = find_format(manifest["format"])
        return written.open_chat(path) or _export_speaker(written, path)
    if place == "latest" or RunDirectory(folder).recipe.is_file():
        return _run_speaker(place)
    meant = meant_run(place, finished=True) or "latest"
    raise RecipeError(
        f"{place} is neither a run directory nor an export", place, shell_line(["qlora-kit", "chat", meant])
    )


def _tell_verdict(manifest: Mapping[str, Any]) -> None:
    """Say of a file that should not simply be served what its manifest says of it, before it answers."""
    verdict = recorded_verdict(manifest)
    if verdict is Verdict.rejected:
        faults = [str(fault) for fault in manifest.get("faults") or ["its manifest.json does not say why"]]
        log.warning(f"this file is rejected, do not serve it: {'; '.join(faults)}")
    elif verdict is Verdict.not_measured:
        log.warning("this file was not measured, so nothing tells how close it is to what it was made from")


def _run_speaker(name: str) -> Any:
    from qlora_kit.adapter.attach import load_adapter
    from qlora_kit.model.load import load_base

    opened = open_run(name)
    log.info(f"loading {opened.directory.path}")
    model = load_adapter(load_base(opened.base.folder, opened.quant), opened.directory.adapter)
    return _torch_speaker(model.eval(), opened.tokenizer)


def _export_speaker(written: Format[Any], path: Path) -> Any:
    log.info(f"loading {path}")
    return _torch_speaker(written.load(path).eval(), load_tokenizer(path))


def _prompt(messages: Messages, tokenizer: Any) -> str:
    """What the model is asked with; rendered in the bounds that a stranger's template has everywhere."""
    if not tokenizer.chat_template:
        raise RecipeError("the model has no chat template, so it cannot be talked to")
    turns = [Message(message["role"], message["content"]) for message in messages]
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map).render(turns, answer_follows=True)
    except TemplateRefusal as refusal:
        raise RecipeError(f"the chat template refuses these messages: {refusal}") from refusal


def _torch_speaker(model: Any, tokenizer: Any) -> Any:
    def speak(messages: Messages, max_new_tokens: int) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        text = _prompt(messages, tokenizer)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[Exception] = []

        def generate() -> None:
            try:
                model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
            except Exception as error:
                failed.append(error)
                streamer.end()  # or the reader would wait for ever

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]

    return speak
