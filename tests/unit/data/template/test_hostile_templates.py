"""A stranger's template ends in a refusal by name, whatever it does, in bounded time and memory."""

import pickle
import resource
import signal
import threading
import time

import pytest

from qlora_kit.core.errors import EXIT_BAD_RECIPE, KitError, RecipeError
from qlora_kit.data.audit.special_tokens import special_tokens
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal, TemplateTooCostlyError
from tests.tiny_tokenizers import CHATML, smollm_tokenizer

TURNS = (Message("user", "a"), Message("assistant", "b"))
ROW = Conversation(TURNS, "a.jsonl", 1)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
HOSTILE = {
    "nested loops": LOOP,
    "a loop in a macro": "{% macro m() %}" + LOOP + "{% endmacro %}{{ m() }}",
    "a filter in a loop": "{% for i in range(99999) %}{{ range(99999)|map('string')|join|length }}{% endfor %}",
    "a text repeated": "{{ 'a' * 10**10 }}",
    "a text repeated, the other way": "{{ 10**10 * 'a' }}",
    "a list repeated": "{{ [0] * 10**10 }}",
    "a list of lists repeated": "{{ [[0] * 10**6] * 10**6 }}",
    "a sum of lists": "{{ ([[0] * 10**5] * 10**5) | sum(start=[]) | length }}",
    "a power": "{{ (10**100000)**1000 }}",
    "a tower of powers": "{{ 9**(9**(9**9)) }}",
    "a power of a power in a loop": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}"
    ),
    "an indent": "{{ messages | tojson(indent=10**9) }}",
    "a text padded": "{{ 'a'.ljust(10**10) }}",
    "a text centered": "{{ 'a' | center(10**10) }}",
    "a number padded": "{{ '%010000000000d' % 1 }}",
    "a number formatted": "{{ '{:010000000000d}'.format(1) }}",
    "a text doubled": DOUBLING,
    "a list doubled": (
        "{% set n = namespace(s=[1, 2]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
    ),
    "a text replaced": "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "macros that call themselves": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 300 + "]" * 300 + " }}",
    "deep blocks": "{% if true %}" * 200 + "{% endif %}" * 200,
    "deep loops": "{% for i in messages %}" * 30 + "{% endfor %}" * 30,
    "a long sum": "{{ " + "1+" * 20_000 + "1 }}",
    "a long number": "{{ " + "9" * 100_000 + " }}",
    "a range too long": "{% for i in range(10**9) %}{% endfor %}",
    "an attribute of Python's": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_in_little_time_and_memory(source):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((TemplateRefusal, TemplateTooCostlyError)):
        ChatTemplate(source, {}, seconds=0.5).render(TURNS)
    assert time.monotonic() - began < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB


@pytest.mark.slow
@pytest.mark.parametrize("source", [LOOP, DOUBLING], ids=["time", "memory"])
def test_a_costly_template_stops_the_whole_preparation_at_once(source):
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = source
    encoder = Encoder.of(tokenizer)
    object.__setattr__(encoder, "template", ChatTemplate(source, {}, seconds=0.5))
    began = time.monotonic()
    with pytest.raises(TemplateTooCostlyError) as caught:
        encoder.rows([ROW] * 100)
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == EXIT_BAD_RECIPE
    assert not isinstance(caught.value, RecipeError)  # which renderings that are only tried would pass over
    assert "a conversation of 2 turns" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, KitError)
    assert again.exit_code == EXIT_BAD_RECIPE


def test_limits_and_signals_are_put_back():
    def kept():
        return resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGPROF)

    before = kept()
    assert ChatTemplate(CHATML, {}).render(TURNS)
    with pytest.raises(TemplateTooCostlyError):
        ChatTemplate(LOOP, {}, seconds=0.25).render(TURNS)
    assert kept() == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_other_threads_render_too():
    texts = []
    thread = threading.Thread(target=lambda: texts.append(ChatTemplate(CHATML, {}).render(TURNS)))
    thread.start()
    thread.join()
    assert texts == [ChatTemplate(CHATML, {}).render(TURNS)]


def test_the_audit_asks_the_same_bounded_template():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    assert special_tokens(tokenizer, frozenset()).frames == frozenset()
