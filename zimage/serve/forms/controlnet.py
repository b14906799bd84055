"""What clients of the web UI ask of its ControlNet extension before they draw; its units: `a1111_control`."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from zimage.serve.answers import CONTROLNET
from zimage.serve.bodies import FormRoute
from zimage.serve.forms.a1111 import constant
from zimage.serve.forms.a1111_control import MODULES, MOST_UNITS
from zimage.serve.openapi import RECORD, TEXT, answers, content, listed, record
from zimage.serve.service import Service
from zimage.settings.fields import Plain

VERSION = 2  # of the extension's form
DETAIL = {name: {"model_free": True, "sliders": []} for name in MODULES}
TOLD: dict[str, tuple[str, dict[str, Plain]]] = {
    "module_list": ("What makes control pictures.", {"module_list": list(MODULES), "module_detail": DETAIL}),
    "version": ("The version of the extension's form.", {"version": VERSION}),
    "settings": ("How many units a request may have.", {"control_net_unit_count": MOST_UNITS}),
}
MODELS = content("Their names.", record("", model_list=listed(TEXT)))


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix=CONTROLNET.rstrip("/"), route_class=FormRoute, tags=["A1111"])
    for name, (description, answer) in TOLD.items():
        told = answers(content(description, RECORD, answer), form=CONTROLNET)
        router.add_api_route(f"/{name}", constant(answer), name=name, responses=told, summary=description)

    @router.get("/model_list", responses=answers(MODELS, form=CONTROLNET))
    async def model_list() -> Response:
        """The control files that a unit may name."""
        return JSONResponse({"model_list": list(await service.controls())})

    return router
