"""The one line behind an exception, however deep a library has wrapped it."""

import pytest

from pipeline.errors import UserError, run, user_message


class Wrapped(Exception):
    """As Ray's RayTaskError and TrainingFailedError hold what a worker raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a traceback\nof many lines")
        self.cause = cause


def test_a_user_error_is_found_in_the_chain() -> None:
    assert user_message(UserError("mend\nthis")) == "mend this"
    assert user_message(Wrapped(UserError("mend this"))) == "mend this"
    outer = Wrapped(ValueError())
    outer.worker_failures = {0: Wrapped(UserError("mend that"))}  # type: ignore[attr-defined]
    assert user_message(outer) == "mend that"
    assert user_message(ValueError("a bug")) is None


def test_run_ends_the_process_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise UserError("the port is taken; choose another")

    with pytest.raises(SystemExit) as ended:
        run(job)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the port is taken; choose another\n"


def test_run_lets_a_bug_through() -> None:
    def job() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(job)
    run(lambda: None)
