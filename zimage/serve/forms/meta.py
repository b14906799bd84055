"""What a client may know of the server: whether it lives, what it draws, and its figures."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from zimage.serve.bodies import FormRoute
from zimage.serve.metrics import MEDIA_TYPE
from zimage.serve.openapi import RECORD, SECONDS, TEXT, WHOLE, answers, content, listed, record
from zimage.serve.schema import described
from zimage.serve.service import Service

WORKER = record("", device=TEXT, state={"enum": ["starting", "ready", "busy", "stopped"]}, job=TEXT, restarts=WHOLE)
HEALTH = record(
    "Health",
    status={"enum": ["ok", "starting", "stopping", "degraded"]},
    version=TEXT,
    uptime=SECONDS,
    queue=WHOLE,
    running=WHOLE,
    workers=listed(WORKER),
)
SCHEMA = record("Schema", others=True, request=RECORD, rewrite=RECORD, lora=RECORD, defaults=RECORD, limits=RECORD)


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=FormRoute, tags=["server"])

    @router.get("/health", responses=answers(content("How it is.", HEALTH)))
    async def health() -> Response:
        """Whether the server lives, and what its workers do."""
        return JSONResponse(service.health())

    @router.get("/metrics", responses=answers(content("Figures.", TEXT, media="text/plain")))
    async def metrics() -> Response:
        """Figures in the text form of Prometheus."""
        health = service.health()
        workers = [(worker["device"], worker["state"], worker["restarts"]) for worker in health["workers"]]
        text = service.metrics.text(health["queue"], health["running"], workers)
        return Response(text, media_type=MEDIA_TYPE)

    @router.get("/api/schema", responses=answers(content("Fields, defaults, limits, the model.", SCHEMA)))
    async def schema() -> Response:
        """Everything that a request may set, with bounds and defaults, and what the model is."""
        launch, loras, controls = service.launch, list(await service.loras()), list(await service.controls())
        return JSONResponse(described(service.about, launch.serving, launch.defaults, loras, controls, launch.presets))

    @router.get("/api/controls", responses=answers(content("Their names.", record("", controls=listed(TEXT)))))
    async def controls() -> Response:
        """The control files that a request may name."""
        return JSONResponse({"controls": list(await service.controls())})

    return router
