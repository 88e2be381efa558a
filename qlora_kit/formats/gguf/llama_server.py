"""llama.cpp's server inside the process, through the documented interface of the xllamacpp wheel.

Needed for chat templates, which only the server renders, and for scoring where the C interface cannot be used. It
listens on a loopback port of its own choice.
"""

import json
import math
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import require
from qlora_kit.formats.gguf import EXTRA

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_ANSWER_SECONDS = 120
_CERTAIN = 1e4  # added to a logit, leaves no choice


class ServerEngine:
    """One model opened in a server of this process.

    Raises:
        RunError: llama.cpp cannot load the file.
    """

    def __init__(self, gguf_file: Path, threads: int, context: int = 4096) -> None:
        wheel = require("xllamacpp", "scoring a GGUF file", EXTRA)
        settings = wheel.CommonParams()
        settings.model.path = str(gguf_file)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.cpuparams.n_threads = threads
        settings.cpuparams_batch.n_threads = threads
        settings.n_threads_http = 2
        settings.port = 0
        settings.warmup = False
        settings.verbosity = -1
        settings.use_jinja = True
        settings.fit_params = False
        try:
            self._server = wheel.Server(settings)
        except RuntimeError as error:
            raise RunError(f"llama.cpp cannot load {gguf_file}: {error}") from error
        self.vocabulary_size = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        # The server answers some requests before its main loop runs, and a loop that is told to end before it began
        # never ends. The slots are read by the loop itself.
        self._ask("/slots")

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Natural-log probabilities of the token after each position, float32 of shape [positions, vocabulary].

        Tokens the server leaves out, because their probability rounds to zero, get minus infinity.
        """
        import numpy as np

        rows = np.full((len(positions), self.vocabulary_size), -math.inf, dtype=np.float32)
        # the server lists no probabilities where the answer is a stop token or half a letter, so the answer is forced;
        # what it lists is from before this bias
        forced = [[self.tokenize("a", False, False)[-1], _CERTAIN]]
        for row, position in zip(rows, positions, strict=True):
            answer = self._complete(token_ids[: position + 1], 1, n_probs=self.vocabulary_size, logit_bias=forced)
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return rows

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """The greedy continuation without its stop token, and the seconds spent on it after the prompt."""
        answer = self._complete(prompt_ids, max_new_tokens, return_tokens=True)
        found = [int(token) for token in answer["tokens"]]
        if answer["stop_type"] == "eos" and len(found) == answer["tokens_predicted"]:
            found = found[:-1]
        return found, float(answer["timings"]["predicted_ms"]) / 1000

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """The greedy continuation, all of it at once."""
        yield from self.generate(prompt_ids, max_new_tokens)[0]

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """llama.cpp's own token ids of a text."""
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(i) for i in self._ask("/tokenize", request)["tokens"]]

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, by the file's own chat template, ready for an answer."""
        return str(self._ask("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"])

    def _complete(self, token_ids: Sequence[int], new_tokens: int, **settings: object) -> dict[str, Any]:
        request = {
            "prompt": list(token_ids),
            "n_predict": new_tokens,
            "temperature": 0,
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
        answer: dict[str, Any] = self._ask("/completion", request | settings)
        return answer

    def _ask(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        address, headers = f"{self._server.listening_address}{route}", {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data=data, headers=headers)  # noqa: S310  # a server in this process
        # no proxy: the address is this machine's own
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
            return json.load(answer)
