"""Where Ray Serve LLM and vLLM are touched: a model plan becomes a running `ray.serve.llm` server and its HTTP app.

Only replicas import this module: it takes seconds, since it imports vLLM.
"""

from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig

from pomarium.cluster.serving.asgi_bridge import App
from pomarium.cluster.serving.plan import ModelPlan


class ModelIsHere(CallbackBase):
    """Spares Ray's download task per node (one more process that imports vLLM): checkpoints are resolved already."""

    async def on_before_node_init(self) -> None:
        """Ray's hook before that task."""
        self.ctx.run_init_node = False


def llm_config(plan: ModelPlan, folder: Path) -> LLMConfig:
    """`plan` for Ray Serve LLM. Kind `cpu` spares its GPU task; the platform replaces the executor that it forces."""
    return LLMConfig(
        model_loading_config={"model_id": plan.name, "model_source": str(folder)},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": plan.bundles(), "strategy": "PACK"},
        callback_config={"callback_class": ModelIsHere},
        engine_kwargs=dict(plan.engine_args),
        log_engine_metrics=True,
    )


class UnreportedServer(LLMServer):
    """LLMServer without the usage report after the start, which keeps a start waiting for one more process."""

    async def start(self) -> None:
        """Start the engine."""
        self.engine = VLLMEngine(self._llm_config)
        await self.engine.start()


class Server:
    """A started engine: health and its OpenAI HTTP application (vLLM's own)."""

    def __init__(self, server: Any, app: App) -> None:
        self._server = server
        self.app = app

    @classmethod
    async def start(cls, plan: ModelPlan, folder: Path) -> "Server":
        """Start engine and workers inside the calling replica's placement group.

        Raises:
            Exception: whatever Ray or vLLM raise; `faults.sentence` makes it readable.
        """
        server = UnreportedServer.sync_init(llm_config(plan, folder))
        await server.start()
        return cls(server, await server.engine.build_asgi_app())

    async def check_health(self) -> None:
        """Raises vLLM's EngineDeadError once the engine is gone."""
        await self._server.check_health()
