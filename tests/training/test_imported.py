"""The user's own code: found in the current directory, and blamed by its own line."""

import sys
import textwrap

import pytest
import torch

from study.errors import ImportFailed
from study.training.imported import LONGEST_MESSAGE, call_user, load_object, user_code, user_function
from study.training.losses import loss_function


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module into the current directory, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(file, text):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(text).lstrip())

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0].startswith("users"):
            del sys.modules[name]


def message_of(function, *args, **kwargs):
    with pytest.raises(ImportFailed) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_a_function_of_the_current_directory_is_found_and_called(write):
    write("users/nets.py", "def net(width, path):\n    return width, path\n")
    assert load_object("import:users.nets:net").__name__ == "net"
    assert call_user("import:users.nets:net", 3, path="x") == (3, "x")


def test_a_module_written_after_the_first_import_is_found(write):
    write("users_a.py", "A = 1\n")
    assert load_object("import:users_a:A") == 1
    write("users_b.py", "B = 2\n")
    assert load_object("import:users_b:B") == 2


def test_what_the_function_raises_is_shown_with_the_users_own_line(write):
    write("users/nets.py", "def net():\n    d = {}\n    return d['x']\n")
    assert message_of(call_user, "import:users.nets:net") == (
        "import:users.nets:net raised KeyError: 'x' at users/nets.py:3 `return d['x']`; mend that line"
    )


def test_the_original_exception_is_chained(write):
    write("users_chain.py", "def net():\n    raise ValueError('no')\n")
    with pytest.raises(ImportFailed) as caught:
        call_user("import:users_chain:net")
    assert isinstance(caught.value.__cause__, ValueError)


RAISING = [
    ("inside a library", "import torch\ndef net():\n    return torch.nn.Linear(3, -1)\n", "users_case.py:3 `return torch.nn.Linear(3, -1)`"),
    ("while the module is imported", "import os\nSIZE = 1 / 0\n", "raised ZeroDivisionError: division by zero at users_case.py:2 `SIZE = 1 / 0`"),
    ("a missing dependency of the module", "import no_such_library\n", "No module named 'no_such_library' at users_case.py:1"),
    ("a syntax error", "x = 1\ndef net(:\n    pass\n", "raised SyntaxError: invalid syntax at users_case.py:2 `def net(:`"),
    ("text that the module parses itself", "def net():\n    return eval('1 +')\n", "at users_case.py:2 `return eval('1 +')`"),
    ("an exit", "import sys\nsys.exit(3)\n", "raised SystemExit: 3 at users_case.py:2 `sys.exit(3)`"),
    ("an exception without words", "def net():\n    assert False\n", "raised AssertionError at users_case.py:2"),
    ("a helper of another module", "import json\ndef net():\n    return json.loads('{')\n", "raised JSONDecodeError"),
]


@pytest.mark.parametrize(("source", "shown"), [pytest.param(source, shown, id=name) for name, source, shown in RAISING])
def test_the_innermost_line_of_the_users_is_shown(write, source, shown):
    write("users_case.py", source)
    assert shown in message_of(call_user, "import:users_case:net")


def test_arguments_that_do_not_fit_show_the_definition(write):
    write("users_args.py", "X = 1\ndef net(width):\n    return width\n")
    shown = message_of(call_user, "import:users_args:net", widht=3)
    assert "raised TypeError: net() got an unexpected keyword argument 'widht'" in shown
    assert "defined at users_args.py:2 `def net(width):`; check `args`" in shown


UNRESOLVED = [
    ("import:users_none.nets:net", "there is no module 'users_none'", "start from the folder that holds it, or install it"),
    ("import:users_here.nets:net", "there is no module 'users_here.nets'", "start from the folder"),
    ("import:users_here:nett", "users_here has no 'nett' (users_here.py)", "did you mean 'net'?"),
    ("import:users_here:zzz", "users_here has no 'zzz'", "name a function that it defines"),
    ("users_here:net", "is not written import:package.module:function (got 'users_here:net')", "for example"),
    ("import:users_here", "is not written import:package.module:function", "for example"),
    ("import:users-here:net", "is not written import:package.module:function", "for example"),
]


@pytest.mark.parametrize(("path", "message", "remedy"), UNRESOLVED)
def test_a_path_that_leads_nowhere_says_why_and_what_to_do(write, path, message, remedy):
    write("users_here.py", "def net():\n    pass\n")
    shown = message_of(load_object, path)
    assert message in shown
    assert remedy in shown


def test_a_value_that_cannot_be_called_is_refused(write):
    write("users_value.py", "net = 3\n")
    assert "import:users_value:net is not a function (got int)" in message_of(user_function, "import:users_value:net")


def test_an_interruption_is_not_the_users_error():
    with pytest.raises(KeyboardInterrupt), user_code("import:a:b"):
        raise KeyboardInterrupt


def test_long_messages_are_cut(write):
    write("users_long.py", "def net():\n    raise ValueError('x' * 5000)\n")
    assert len(message_of(call_user, "import:users_long:net")) < LONGEST_MESSAGE + 200


LOGITS, LABELS = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_entropy", -(torch.log_softmax(LOGITS, 1)[[0, 1], LABELS]).mean()),
        ("mse", torch.tensor((1.0 + 1.0 + 0.0 + 0.0 + 1.0 + 1.0) / 6)),
    ],
)
def test_losses_are_means(name, expected):
    torch.testing.assert_close(loss_function(name)(LOGITS, LABELS), expected)


def test_a_loss_may_be_the_users_own(write):
    write("users_loss.py", "def loss(logits, labels):\n    return logits.sum()\n\ndef each(logits, labels):\n    return logits.sum(1)\n")
    assert loss_function("import:users_loss:loss")(LOGITS, LABELS) == LOGITS.sum()
    assert "must return a scalar tensor (got shape [2])" in message_of(loss_function("import:users_loss:each"), LOGITS, LABELS)
