"""Sessions that need an environment of their own: the oldest and the newest transformers."""

from __future__ import annotations

import nox

nox.options.sessions = ["transformers"]

RELEASES = {"oldest": "transformers==5.22.0", "newest": "transformers>=5.22,<6"}


@nox.session
@nox.parametrize("release", list(RELEASES))
def transformers(session: nox.Session, release: str) -> None:
    """Run the tests of the integration on one release of transformers."""
    session.install("-e", ".[test]", RELEASES[release])
    tests = "tests/integrations/transformers"
    # Nothing here may ask the model hub.
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", tests, *session.posargs, env=offline)


@nox.session
def browser(session: nox.Session) -> None:
    """Open a report in headless Chromium, which must be installed (CHROMIUM names it)."""
    session.install("-e", ".[test]", "playwright")
    test = "tests/integrations/evaluation/test_report_in_browser.py"
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("python", "-m", "pytest", "-q", "-m", "slow", test, *session.posargs, env=offline)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """Run local tasks through lmms-eval, whose hundred packages no other session needs."""
    session.install("-e", ".[test,lmms-eval]")
    tests = "tests/integrations/lmms_eval"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    session.run(
        "python", "-m", "pytest", "-q", "-m", "slow or not slow", tests, *session.posargs,
        env=offline,
    )  # fmt: skip
