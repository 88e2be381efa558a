"""The part of Go's text/template that the kit renders; the expected texts were printed by Go 1.27 itself."""

import pytest

from qlora_kit.data.template.go_template import GoTemplate, GoTemplateError, Value

TURNS = [{"Role": "user", "Content": " a\n"}, {"Role": "assistant", "Content": "b"}, {"Role": "user", "Content": "c"}]
VALUES: dict[str, Value] = {"System": "", "Messages": TURNS, "Response": ""}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x{{ .System }}y", "xy"),
        ("{{ range .Messages }}{{ .Role }}:{{ .Content }}|{{ end }}", "user: a\n|assistant:b|user:c|"),
        ("a  {{- range .Messages }}  {{ .Role -}}  \n x {{ end -}}  b", "a  userx   assistantx   userx b"),
        ("a \n {{- /* a remark */ -}} \t b", "ab"),
        ("{{ if .System }}yes{{ else }}no{{ end }}", "no"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ end }}", "012"),
        ("{{ range $m := .Messages }}{{ $.System }}.{{ end }}", "..."),
        ('{{ $a := "x" }}{{ range .Messages }}{{ $a }}{{ $a = .Role }}{{ $a := "in" }}{{ $a }}{{ end }}{{ $a }}',
         "xinuserinassistantinuser"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else if ne .Role "user" }}A{{ end }}{{ end }}', "UAU"),
        ('{{ range .Messages }}{{ if or (eq .Role "x" "assistant") (not $.Messages) }}1{{ else }}0{{ end }}{{ end }}',
         "010"),
        ('{{ range .Messages }}{{ if and .Content (eq .Content "c") }}last{{ end }}{{ end }}', "last"),
        ("{{ range $i, $m := .Messages }}{{ len (slice $.Messages $i) }}{{ end }}", "321"),
        ('{{ if eq (len .Messages) 3 }}{{ "q\\"\\n" }}{{ end }}', 'q"\n'),
        ("{{ true }}{{ not true }}", "truefalse"),
    ],
)  # fmt: skip
def test_it_renders_as_go_does(source: str, expected: str) -> None:
    assert GoTemplate(source).render(VALUES) == expected


def test_else_of_a_range_is_for_an_empty_list() -> None:
    template = GoTemplate("{{ range .Messages }}x{{ else }}none{{ end }}")
    assert template.render({"Messages": []}) == "none"
    assert template.render(VALUES) == "xxx"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ .Tools }}", "Tools"),  # Go prints <no value>; a text that no model should see
        ("{{ json .System }}", "json"),
        ("{{ .System | printf }}", "not known here"),
        ("{{ with .System }}x{{ end }}", "unexpected"),
        ("{{ .Messages.First }}", "not known here"),
        ("{{ range .System }}x{{ end }}", "not a list"),
        ("{{ $a = 1 }}", "undefined variable"),
        ("{{ eq .System }}", "number of arguments"),
        ("{{ .Messages }}", "not a text"),
        ("{{ slice .System 1 }}", "not a list"),
    ],
)
def test_what_is_not_known_is_refused(source: str, words: str) -> None:
    with pytest.raises(GoTemplateError, match=words):
        GoTemplate(source).render(VALUES)


@pytest.mark.parametrize(
    "source", ["{{ if .System }}x", "x{{ end }}", "{{ .System", "{{ }}", "{{ range .A }}{{ else }}"]
)
def test_a_malformed_template_is_refused(source: str) -> None:
    with pytest.raises(GoTemplateError):
        GoTemplate(source)
