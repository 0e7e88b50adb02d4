"""Root causes in the logs of servers that did not start."""

from bench import server_log

OURS = """\
(Worker pid=5) ERROR 11-23 17:13:41 [exec.py:953] vllm_sparse.errors.FormatError: bitmask is not 2:4
(Worker pid=5) ERROR 11-23 17:13:41 [exec.py:953] During handling of the above exception
(Worker pid=5) ERROR 11-23 17:13:41 [exec.py:953] vllm_sparse.errors.FormatError: layer 0: not 2:4
(EngineCore pid=4) ERROR 11-23 17:13:43 [core.py:1510] Exception: WorkerProc initialization failed due to it
RuntimeError: Engine core initialization failed. See root cause above.
"""
PYDANTIC = """\
(APIServer pid=4) WARNING 11-23 17:12:47 [base.py:380] ValueError: Tokenizer not available
Traceback (most recent call last):
  File "x.py", line 3, in f
    raise ValueError("no")
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['Foo'] are not supported. [type=value_error, input_type=dict]
    For further information visit a page
"""


def test_our_own_error_comes_first() -> None:
    assert server_log.cause(OURS.splitlines()) == "layer 0: not 2:4"


def test_pydantics_finding_is_on_the_next_line() -> None:
    assert server_log.cause(PYDANTIC.splitlines()) == "Model architectures ['Foo'] are not supported."


def test_no_exception_no_cause() -> None:
    assert server_log.cause(["Killed", "Loading weights: 10%"]) is None


def test_messages_lose_their_prefix() -> None:
    line = "(EngineCore pid=7) INFO 01-01 10:00:00 [x.py:3] Loading weights took 3 s"
    assert server_log.last_message([line, ""]) == "Loading weights took 3 s"
    assert server_log.message("a[0] b") == "a[0] b"
