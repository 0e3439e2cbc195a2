import sys

import pytest

from xtuner_hydra.data.formats import Text, parse_openai
from xtuner_hydra.data.own_format import find_format, format_identity
from xtuner_hydra.errors import ConfigError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}

MODULE = """
from xtuner_hydra.data.formats import Text

def question(record):
    return [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]

def document(record):
    return record["a"]

def pair(record):
    return Text([(record["q"], False), (record["a"], True)])

class Swapped:
    def __call__(self, record):
        return question({"q": record["a"], "a": record["q"]})

swapped = Swapped()
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_formats", "my_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "my_formats.py").write_text(MODULE)
    return tmp_path / "my_formats.py"


def test_a_format_of_the_user_s(module):
    record = {"q": "Hi", "a": "Hello."}
    assert find_format("my_formats:question")(record) == parse_openai([USER, ANSWER])
    assert find_format("my_formats:document")(record) == Text([("Hello.", True)])
    assert find_format("my_formats:swapped")({"q": "Hello.", "a": "Hi"}) == parse_openai([USER, ANSWER])
    assert find_format("my_formats:pair")(record) == Text([("Hi", False), ("Hello.", True)])
    with pytest.raises(ValueError, match=r"my_formats:question failed \(KeyError: 'a'\)"):
        find_format("my_formats:question")({"q": "Hi"})


def test_the_identity_of_a_user_s_format_is_the_content_of_its_file(module):
    names = ("my_formats:question", "my_formats:swapped")
    before = list(map(format_identity, names))
    module.write_text(MODULE + "\n# changed\n")
    assert all(format_identity(name) != then for name, then in zip(names, before, strict=True))
    assert format_identity("openai") == "openai"


def test_modules_that_a_user_s_format_uses_belong_to_its_identity(module):
    """Also where a decorator of another module's would pass its own file for the format's."""
    helper = module.with_name("my_helper.py")
    helper.write_text("import functools\n\ndef noted(f):\n    return functools.wraps(f)(lambda *args: f(*args))\n")
    module.write_text("import json\nfrom my_helper import noted\n\n@noted\ndef decorated(record):\n    return record['a']\n")
    before = format_identity("my_formats:decorated")
    assert format_identity("my_formats:decorated") == before
    module.write_text(module.read_text() + "# changed\n")
    after = format_identity("my_formats:decorated")
    helper.write_text(helper.read_text() + "# changed\n")
    assert len({before, after, format_identity("my_formats:decorated")}) == 3


def test_a_package_is_known_by_the_module_that_its_format_comes_from(module):
    """Installed or not, and by a module beside it."""
    for place in (module.parent, module.parent / "site-packages"):
        package = place / "my_package"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("from my_package.inner import read\n")
        (package / "inner.py").write_text("from my_beside import clean\n\ndef read(record):\n    return clean(record)\n")
        (place / "my_beside.py").write_text("def clean(record):\n    return record['a']\n")
        sys.path.insert(0, str(place))
        before = format_identity("my_package:read")
        (package / "inner.py").write_text((package / "inner.py").read_text() + "# changed\n")
        changed = format_identity("my_package:read")
        (place / "my_beside.py").write_text("# changed\n")
        assert changed != before
        assert (format_identity("my_package:read") != changed) == (place == module.parent)  # the environment's otherwise
        for name in ("my_package", "my_package.inner", "my_beside"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere.at_all:f", "ModuleNotFoundError"), ("my_formats:missing", "AttributeError"), ("my_formats:number", "is not a function")],
)
def test_a_format_that_cannot_be_imported_is_refused(module, name, words):
    with pytest.raises(ConfigError, match=rf"data\.format={name}: .*{words}"):
        find_format(name)
