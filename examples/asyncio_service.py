"""A control plane over HTTP: an aiohttp service that owns a fleet. `pip install aiohttp`

python asyncio_service.py            serves on port 8080 until Ctrl-C
python asyncio_service.py --visit    serves one client, itself, and ends
"""

import asyncio
import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, web
from aiohttp.typedefs import Handler

import orchestra as orc
import orchestra.aio

FLEET = web.AppKey("fleet", orc.aio.Fleet)
STATUS = {orc.UnknownVm: 404, orc.VmExists: 409, orc.StateError: 409, orc.SpecError: 400}

routes = web.RouteTableDef()


async def own_a_fleet(app: web.Application) -> AsyncIterator[None]:
    """The fleet lives as long as the service: when that ends, in whatever way, its VMs are stopped."""
    async with orc.aio.open_fleet() as fleet:
        app[FLEET] = fleet
        yield


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except orc.OrchestraError as error:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        return web.json_response({"error": str(error)}, status=status)


@routes.get("/vms")
async def list_vms(request: web.Request) -> web.Response:
    return web.json_response({name: vm.state for name, vm in request.app[FLEET].vms.items()})


@routes.put("/vms/{name}")
async def launch(request: web.Request) -> web.Response:
    boot = orc.FlatImage(code=await request.read())
    vm = await request.app[FLEET].launch(orc.VmSpec(name=request.match_info["name"], boot=boot))
    return web.json_response({"state": vm.state}, status=201)


@routes.get("/vms/{name}")
async def show(request: web.Request) -> web.Response:
    vm = request.app[FLEET].vm(request.match_info["name"]).statistics()
    return web.json_response({"state": vm.state, "throttled": vm.throttled, "exits": dict(vm.exits)})


@routes.put("/vms/{name}/limit")
async def set_limit(request: web.Request) -> web.Response:
    vm = request.app[FLEET].vm(request.match_info["name"])
    await vm.set_limit(orc.Limit(**await request.json()), meter=orc.Meter.EXITS)
    return web.json_response({})


@routes.delete("/vms/{name}")
async def stop(request: web.Request) -> web.Response:
    outcome = await request.app[FLEET].vm(request.match_info["name"]).stop("asked for over HTTP")
    return web.json_response({"outcome": str(outcome)})


async def visit(url: str) -> None:
    noisy = bytes.fromhex("e680 ebfc")  # out 0x80, al / jmp
    async with ClientSession(url) as client:
        async with client.put("/vms/noisy", data=noisy) as response:
            print("launched:", response.status, await response.json())
        async with client.put("/vms/noisy", data=noisy) as response:
            print("again:", response.status)
        async with client.put("/vms/noisy/limit", json={"rate": 100}) as response:
            print("limited:", response.status)
        async with client.get("/vms") as response:
            print("all:", await response.json())
        async with client.delete("/vms/noisy") as response:
            print("stopped:", await response.json())
        async with client.get("/vms/noisy") as response:
            print("gone:", response.status)


async def main(visited: bool) -> None:
    app = web.Application(middlewares=[errors_as_json])
    app.add_routes(routes)
    app.cleanup_ctx.append(own_a_fleet)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0 if visited else 8080)
        await site.start()
        host, port = runner.addresses[0][:2]
        if visited:
            await visit(f"http://{host}:{port}")
        else:
            print(f"http://{host}:{port}/vms")
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    try:
        asyncio.run(main("--visit" in sys.argv))
    except KeyboardInterrupt:
        pass
