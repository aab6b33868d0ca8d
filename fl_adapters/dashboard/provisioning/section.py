"""The section "Project": participants, their kits and one-time passwords, and their certificates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from fl_adapters.dashboard.forms import act, form_of
from fl_adapters.dashboard.page import link, live, page
from fl_adapters.dashboard.provisioning.desk import Participant, ProjectDesk
from fl_adapters.environments.report.document import Content, tag
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.identity import ROLES
from fl_runtime.trust.provisioning.making import MadeKit


class ProjectSection:
    """Pages about a project's participants, on the machine of its authority. A `Section`.

    Args:
        desk: Reads and changes the project.
    """

    title = "Project"
    path = "/project"

    def __init__(self, desk: ProjectDesk) -> None:
        self._desk = desk

    def routes(self) -> Sequence[Route]:
        """Return the routes of the list, of downloads and of the acts."""
        acts: Mapping[str, Callable[[Request, Mapping[str, str]], Response]] = {
            "create": self._create,
            "add": self._add,
            "kit": self._hand_out,
            "renew": self._renew,
            "revoke": self._revoke,
            "tell": self._tell_server,
        }
        return [
            Route(self.path, self._list),
            Route(f"{self.path}/archive/{{name}}", self._archive),
            Route(f"{self.path}/certificate/{{name}}", self._certificate),
            *(Route(f"{self.path}/{name}", _posted(carry_out), methods=["POST"]) for name, carry_out in acts.items()),
        ]

    def version(self, path: str) -> str:
        """Return what changes with the project."""
        return self._desk.version() if path.partition("?")[0] == self.path else ""

    def close(self) -> None:
        """Do nothing: no file stays open."""

    # -- pages -------------------------------------------------------------------------------------------------

    def _list(self, request: Request) -> Response:
        if not self._desk.has_project:
            return page(request, "Make a project", _new_project(self._desk))
        project, fingerprint, participants = self._desk.read()
        server = ", ".join(project.server.addresses)
        return page(
            request,
            f"Project {project.federation}",
            tag("p", f"Server at {server}. The authority's fingerprint: ", tag("code", fingerprint)),
            live("participants", [self._card(item) for item in participants]),
            tag("h2", "Add a participant"),
            _new_participant(),
            tag("h2", "Tell the server"),
            self._how_to_tell(),
            tag("p", f"With `fl-adapters provision`, use the project file {self._desk.authority_folder}/project.yml."),
        )

    def _how_to_tell(self) -> list[Element]:
        if self._desk.tells_server:
            what = "Send it the newest lists of members and of revoked certificates. Revoking does so by itself."
            return [tag("p", what), act("Tell the server", f"{self.path}/tell")]
        what = "A server whose kit lies in this folder gets the list of members by itself. Any other is told by"
        command = f"fl-adapters cert crl --authority {self._desk.authority_folder} --kit ADMIN_KIT"
        return [tag("p", what), tag("pre", command)]

    def _card(self, item: Participant) -> Element:
        name, standing = item.identity.name, item.standing
        fields = {"name": name}
        what = f"{item.identity.role or item.identity.kind} of {item.identity.organisation}"
        acts: list[Element] = []
        if standing is None and item.kit is None:
            acts.append(act(f"Hand out a kit to {name}", f"{self.path}/kit", fields))
        if standing is not None and standing.counts:
            acts.append(act(f"Renew {name}", f"{self.path}/renew", fields))
            acts.append(act(f"Revoke {name}", f"{self.path}/revoke", fields, confirm=name))
        if standing is not None and (item.kit is None or item.kit.suffix == ".zip"):
            again = {**fields, "again": "yes"}
            acts.append(act(f"Another kit for {name}", f"{self.path}/kit", again, confirm=name))
        facts = tag("p", f"{what}. Certificate: ", _certificate_of(item), ". Kit: ", _kit_of(item))
        return tag("article", tag("h2", name), facts, acts)

    def _archive(self, request: Request) -> Response:
        path = self._desk.archive(request.path_params["name"])
        return _download(path.read_bytes(), path.name, "application/zip")

    def _certificate(self, request: Request) -> Response:
        name = request.path_params["name"]
        return _download(self._desk.certificate(name), f"{name}.pem", "application/x-pem-file")

    # -- acts --------------------------------------------------------------------------------------------------

    def _create(self, request: Request, form: Mapping[str, str]) -> Response:
        names = ("federation", "address", "site", "organisation")
        self._desk.create(*(form.get(name, "").strip() for name in names))
        return RedirectResponse(self.path, 303)

    def _add(self, request: Request, form: Mapping[str, str]) -> Response:
        name, organisation, role = (form.get(field, "").strip() for field in ("name", "organisation", "role"))
        self._desk.add(name, organisation, "" if role == "site" else role)
        return RedirectResponse(self.path, 303)

    def _hand_out(self, request: Request, form: Mapping[str, str]) -> Response:
        name, again = form.get("name", ""), form.get("again") == "yes"
        if again:
            _check_confirmed(form)
        return _handed_out(request, self._desk.hand_out(name, again=again))

    def _renew(self, request: Request, form: Mapping[str, str]) -> Response:
        name = form.get("name", "")
        self._desk.renew(name)
        return page(
            request,
            f"Renewed: {name}",
            tag("p", tag("a", f"Download {name}.pem", href=f"{self.path}/certificate/{quote(name, safe='')}")),
            tag("p", f"Send it to {name}, who installs it without stopping a run:"),
            tag("pre", f"fl-adapters cert install {name}.pem --kit KIT"),
            tag("p", link("Back to the project", self.path)),
        )

    def _revoke(self, request: Request, form: Mapping[str, str]) -> Response:
        _check_confirmed(form)
        name, count = form["name"], self._desk.revoke(form["name"])
        command = f"fl-adapters cert revoke {name} --authority {self._desk.authority_folder} --kit ADMIN_KIT"
        return page(
            request,
            f"Revoked: {name}",
            tag("p", f"Certificates revoked: {count}."),
            self._told() if self._desk.tells_server else _to_tell(command),
            tag("p", link("Back to the project", self.path)),
        )

    def _tell_server(self, request: Request, form: Mapping[str, str]) -> Response:
        if not self._desk.tells_server:
            raise ConfigError("no server is connected", fix="start the dashboard with --kit and the kit of an admin")
        return page(request, "Tell the server", self._told(), tag("p", link("Back to the project", self.path)))

    def _told(self) -> list[Element]:
        """Send the newest lists to the server, and say whether it has taken them."""
        try:
            self._desk.tell_server()
        except FederationError as error:
            problem = tag("strong", f"THE SERVER HAS NOT TAKEN THE LIST: {error.what}.", class_="bad")
            fix = [tag("p", f"What to do: {error.fix}.")] if error.fix else []
            again = tag("p", "Until it has, it may still accept what was revoked. As soon as it answers:")
            return [tag("p", problem, role="alert"), *fix, again, act("Tell the server again", f"{self.path}/tell")]
        said = "The server has taken the list, and refuses what was revoked from now on."
        return [tag("p", tag("strong", said, class_="good"), role="status")]


def _posted(carry_out: Callable[[Request, Mapping[str, str]], Response]) -> Callable[[Request], object]:
    """Make an endpoint that reads a form of bounded size and carries out its act in a thread."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(carry_out, request, await form_of(request))

    return endpoint


def _to_tell(command: str) -> list[Element]:
    what = "Unless the server's kit lies in this folder, the server still accepts them until it is told:"
    return [tag("p", what), tag("pre", command)]


def _check_confirmed(form: Mapping[str, str]) -> None:
    if not form.get("name") or form.get("confirm", "").strip() != form["name"]:
        raise ConfigError(
            f"nothing was done: what was typed is not the name {form.get('name', '')[:64]!r}",
            fix="go back, and type the participant's name to confirm",
        )


def _handed_out(request: Request, made: MadeKit) -> Response:
    name = made.identity.name
    password = tag("input", id="password", value=made.password, readonly="", size=32, spellcheck="false")
    outside = "It has no certificate yet: its owner installs that of its own authority with `cert install`."
    return page(
        request,
        f"Kit of {name}",
        tag("p", tag("a", f"Download {name}.zip", href=f"/project/archive/{quote(name, safe='')}", id="download")),
        tag("label", tag("span", "Password, which is shown only now. Tell it by another way than the kit"), password),
        tag("p", f"{made.identity} opens it with:"),
        tag("pre", f"fl-adapters unpack {name}.zip"),
        *([tag("p", outside)] if made.awaits_outside else []),
        tag("p", link("Back to the project", "/project")),
    )


def _certificate_of(item: Participant) -> Content:
    if item.standing is None:
        return "none"
    certificate = item.standing.certificate
    text = f"{item.standing.state}, until {certificate.not_after:%Y-%m-%d} ({certificate.days_left():.0f} days)"
    return tag("span", text, class_="bad") if item.standing.state != "valid" else text


def _kit_of(item: Participant) -> Content:
    if item.kit is None:
        return "not here"
    if item.kit.suffix == ".zip" and item.kit.is_file():
        return link(item.kit.name, f"/project/archive/{quote(item.identity.name, safe='')}")
    return f"folder {item.kit}"


def _field(label: str, name: str, hint: str = "") -> Element:
    box = tag("input", name=name, required="", maxlength=300, autocomplete="off", spellcheck="false", placeholder=hint)
    return tag("label", tag("span", label), box)


def _new_project(desk: ProjectDesk) -> Element:
    return tag(
        "form",
        tag(
            "p",
            f"There is no project in {desk.folder} yet. It gets an authority there, which signs certificates.",
        ),
        _field("Name of the federation", "federation", "tumour-study"),
        _field("Server, as sites and admins reach it", "address", "fl.example.org:8443"),
        _field("First site", "site", "north"),
        _field("Organisation of that site", "organisation", "north-hospital"),
        tag("button", "Make the project", type="submit"),
        method="post",
        action="/project/create",
    )


def _new_participant() -> Element:
    kinds = [tag("option", kind, value=kind) for kind in ("site", *ROLES)]
    return tag(
        "form",
        _field("Name", "name"),
        _field("Organisation", "organisation"),
        tag("label", tag("span", "Site, or role of an admin"), tag("select", kinds, name="role")),
        tag("button", "Add", type="submit"),
        method="post",
        action="/project/add",
    )


def _download(data: bytes, name: str, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})
