"""Ray's table of actors, read as the parts of an endpoint. Entries are Ray's own messages."""

from dataclasses import replace

from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.core.generated.gcs_pb2 import ActorTableData

from pomarium.cluster.rack import serve_actors
from pomarium.cluster.rack.serve_actors import CONTROLLER, ENGINE, INGRESS, Part, ServeActor

DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
LEFT = "Worker exit type: INTENDED_USER_EXIT"

HERE = (
    ServeActor(CONTROLLER, alive=True),
    ServeActor(INGRESS, "ingress", "i1", alive=True),
    ServeActor(ENGINE, "engine:tiny", "r1", alive=True),
)


def entry(name: str, state: int = ActorTableData.ALIVE, reason: int | None = None, said: str = DIED) -> ActorTableData:
    made = ActorTableData(name=name, state=state, start_time=2000, end_time=3000)
    if reason is not None:
        died = made.death_cause.actor_died_error_context
        died.reason, died.error_message, died.pid, died.node_ip_address = reason, said, 7, "10.0.0.2"
    return made


def test_names_tell_what_an_actor_is() -> None:
    read = serve_actors._serve_actor
    assert read(entry("SERVE_CONTROLLER_ACTOR")) == ServeActor(CONTROLLER, alive=True, began=2.0, ended=3.0)
    ingress = read(entry("SERVE_REPLICA::pomarium#ingress#i1", ActorTableData.PENDING_CREATION))
    assert ingress == ServeActor(INGRESS, "ingress", "i1", coming=True, began=2.0, ended=3.0)
    engine = read(entry("SERVE_REPLICA::pomarium#engine:org--m#x1"))
    assert engine == ServeActor(ENGINE, "engine:org--m", "x1", alive=True, began=2.0, ended=3.0)
    assert read(entry("SERVE_REPLICA::other#thing#x1")) is None
    assert read(entry("SERVE_PROXY_ACTOR-abc")) is None, "of other applications of the same Serve"
    assert read(entry("")) is None
    restarted = entry("SERVE_CONTROLLER_ACTOR")
    restarted.num_restarts = 2
    assert (read(restarted) or ServeActor(INGRESS)).restarts == 2


def test_what_an_actor_ended_of() -> None:
    def end(state: int, reason: int | None = None, said: str = DIED) -> str | None:
        actor = serve_actors._serve_actor(entry("SERVE_REPLICA::pomarium#ingress#i1", state, reason, said))
        assert actor is not None
        return actor.end

    dead = ActorTableData.DEAD
    killed = end(dead, ActorDiedErrorContext.WORKER_DIED)
    assert killed is not None
    assert killed.startswith("its process (pid 7 at 10.0.0.2) crashed or was killed, as by signal 9")
    assert end(dead, ActorDiedErrorContext.NODE_DIED) == "its machine, 10.0.0.2, is gone"
    assert end(dead, ActorDiedErrorContext.RAY_KILL) is None, "on purpose"
    assert end(dead, ActorDiedErrorContext.WORKER_DIED, LEFT) is None
    assert end(ActorTableData.ALIVE) is None
    assert end(ActorTableData.RESTARTING) == "its process crashed or was killed"
    failed = entry("SERVE_REPLICA::pomarium#ingress#i1", dead)
    failed.death_cause.runtime_env_failed_context.error_message = "no\nspace left."
    assert serve_actors._end(failed) == "Ray says: no space left"


def test_an_endpoint_that_is_whole_misses_nothing() -> None:
    assert serve_actors.missing(HERE, {"r1"}) == ()
    assert serve_actors.missing((), set()) == ()
    assert serve_actors.missing(HERE[:1], set()) == (), "Serve without an endpoint"


def test_each_part_is_missed() -> None:
    for at, what in enumerate(["the controller", "the ingress", "the engine of tiny"]):
        lost = replace(HERE[at], alive=False, end="it was killed")
        (part,) = serve_actors.missing((*HERE[:at], lost, *HERE[at + 1 :]), {"r1"})
        assert part == Part(what, "it was killed", False)
        assert str(part) == f"{what} was lost: it was killed"
        again = replace(HERE[at], alive=False, coming=True)
        (part,) = serve_actors.missing((*HERE[:at], lost, again, *HERE[at + 1 :]), {"r1"})
        assert str(part) == f"{what} was lost: it was killed; another is being started"


def test_an_engine_that_runs_but_does_not_serve_yet_is_missed() -> None:
    (part,) = serve_actors.missing(HERE, set())
    assert str(part) == "the engine of tiny is being started"


def test_what_was_ended_on_purpose_is_missed_by_nobody() -> None:
    over = tuple(replace(actor, alive=False) for actor in HERE)
    assert serve_actors.missing(over, set()) == ()
    crashed_before = replace(HERE[2], alive=False, end="it was killed")
    assert serve_actors.missing((*over[:2], crashed_before), set()) == (), "Serve was shut down since"
    asleep = (*HERE[:2], replace(HERE[2], alive=False))
    assert serve_actors.missing(asleep, set()) == ()


def test_replicas_that_are_gone_and_those_that_run() -> None:
    lost = ServeActor(ENGINE, "engine:tiny", "r0", end="it was killed")
    assert serve_actors.gone((lost, *HERE)) == {"r0"}
    assert serve_actors.running((lost, *HERE)) == {"i1", "r1"}
