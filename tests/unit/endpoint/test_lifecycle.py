"""When `pomarium serve` takes an endpoint for up, and what it says at the first start that fails."""

import pytest
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview

from pomarium.cluster import faults
from pomarium.cluster.endpoint import lifecycle

FAILED = "A replica failed to start with exception. Retrying 999 more time(s). Error:\n"


def overview(status: str, *messages: str) -> ApplicationStatusOverview:
    deployments = {
        str(at): DeploymentStatusOverview(
            status="UPDATING",  # type: ignore[arg-type]
            status_trigger="UNSPECIFIED",  # type: ignore[arg-type]
            replica_states={},
            message=message,
        )
        for at, message in enumerate(messages)
    }
    return ApplicationStatusOverview(ApplicationStatus(status), "", 0.0, deployments)


def test_it_is_up_once_all_runs() -> None:
    assert not lifecycle._is_up(overview("DEPLOYING", "", "2 replicas are starting"))
    assert lifecycle._is_up(overview("RUNNING", "", ""))


def test_the_first_failed_start_is_told_though_serve_would_try_again() -> None:
    message = f"{FAILED}...\n{faults.StartError('2 stages need 2 Macs and there are 1')}"
    with pytest.raises(lifecycle.EngineStartError, match=r"^2 stages need 2 Macs and there are 1$"):
        lifecycle._is_up(overview("DEPLOYING", "", message))


@pytest.mark.parametrize("status", ["DEPLOYING", "DEPLOY_FAILED"])
def test_a_failure_without_a_sentence_of_ours_is_quoted(status: str) -> None:
    with pytest.raises(lifecycle.EngineStartError, match=r"^The engine did not start: .* No module"):
        lifecycle._is_up(overview(status, f"{FAILED}No module\nnamed x"))
