"""Hostile variants: files that a careless admin opens. Each is read as a command does, in a folder of its own."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyzipper
from attack_table import Attack

from fl_adapters.job import Job
from fl_runtime.trust.policy import read_policy
from fl_runtime.trust.project import read_project
from fl_runtime.trust.provisioning.archive import read_archive

_PASSWORD = "a-password"


def unpacks(
    *names: str, content: bytes = b"x", encrypted: bool = True, mode: int = 0o100600
) -> Callable[[Path], object]:
    """Unpack an archive with files of these names. Nothing may be written outside the folder that is asked for."""

    def send(folder: Path) -> object:
        data = io.BytesIO()
        if encrypted:
            with pyzipper.AESZipFile(data, "w", pyzipper.ZIP_DEFLATED, encryption=pyzipper.WZ_AES) as archive:
                archive.setpassword(_PASSWORD.encode())
                for name in names:
                    entry = archive.zipinfo_cls(name)
                    entry.external_attr, entry.create_system = mode << 16, 3
                    entry.compress_type = pyzipper.ZIP_DEFLATED
                    archive.writestr(entry, content)
        else:
            with zipfile.ZipFile(data, "w") as plain:
                for name in names:
                    plain.writestr(name, content)
        (folder / "kit.zip").write_bytes(data.getvalue())
        read_archive(folder / "kit.zip", folder / "kit", _PASSWORD)
        outside = [
            path
            for path in folder.rglob("*")
            if path.is_file() and path.parent.name != "kit" and path.name != "kit.zip"
        ]
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        return f"unpacked {sorted(p.name for p in (folder / 'kit').iterdir())}, outside {outside}, links {links}"

    return send


def reads(read: Callable[[Path], object], text: str) -> Callable[[Path], object]:
    def send(folder: Path) -> object:
        (folder / "file.yml").write_text(text)
        return read(folder / "file.yml")

    return send


_A = partial(Attack, "mail", who="mail", phase="apart")
_INSIDE = r"outside \[\], links \[\]"
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
)
_DEEP = "app: " + "[" * 5000
_BAD_YAML = "YAML|cannot be understood|is not a field|not a table|not a setting"

ATTACKS = (
    _A(name="an archive that unpacks outside", send=unpacks("north/../../../escaped"), gets=_INSIDE),
    _A(name="an archive with absolute names", send=unpacks("/tmp/escaped"), gets=_INSIDE),
    _A(name="an archive with a name of Windows", send=unpacks("north\\..\\escaped"), gets="archive|password"),
    _A(name="an archive of one file twice", send=unpacks("a/key.pem", "b/key.pem"), gets="archive|password|" + _INSIDE),
    _A(
        name="an archive with a link",
        send=unpacks("north/link", content=b"/etc/passwd", mode=0o120777),
        gets="archive|" + _INSIDE,
    ),
    _A(
        name="an archive that swells to 300 MB",
        send=unpacks("north/kit.json", content=b"\0" * 300 * 2**20),
        gets="archive|password|large",
    ),
    _A(name="an archive without encryption", send=unpacks("north/kit.json", encrypted=False), gets="archive|password"),
    _A(name="a job file that swells", send=reads(Job.from_file, _BOMB), gets=_BAD_YAML),
    _A(name="a job file nested 5,000 deep", send=reads(Job.from_file, _DEEP), gets=_BAD_YAML),
    _A(name="a date that does not exist", send=reads(Job.from_file, "app: 2001-99-99"), gets=_BAD_YAML),
    _A(name="a timestamp that is none", send=reads(read_policy, "filters: !!timestamp x"), gets=_BAD_YAML),
    _A(name="a truth value that is none", send=reads(read_policy, "info: !!bool perhaps"), gets=_BAD_YAML),
    _A(name="a number of 5,000 digits", send=reads(Job.from_file, "rounds: " + "9" * 5000), gets=_BAD_YAML),
    _A(name="a policy nested 5,000 deep", send=reads(read_policy, _DEEP), gets=_BAD_YAML),
    _A(name="a project nested 5,000 deep", send=reads(read_project, _DEEP), gets=_BAD_YAML),
    _A(name="a policy with a rule twice", send=reads(read_policy, "info: true\ninfo: false"), gets="'info' twice"),
    _A(
        name="a job file with an object",
        send=reads(Job.from_file, "app: !!python/object/apply:os.system [ls]"),
        gets=_BAD_YAML,
    ),
    _A(
        name="a job file of the wrong types",
        send=reads(Job.from_file, "app: x\nrounds: [1]\nsites: {a: b}"),
        gets="rounds",
    ),
    _A(name="a policy that swells", send=reads(read_policy, _BOMB), gets=_BAD_YAML),
    _A(name="a policy with an object", send=reads(read_policy, "filters: !!python/name:os.system"), gets=_BAD_YAML),
    _A(name="a policy that is a list", send=reads(read_policy, "- a\n- b"), gets="fields|policy|valid"),
    _A(name="a project that swells", send=reads(read_project, _BOMB), gets=_BAD_YAML),
)
