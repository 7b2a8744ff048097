"""Looks up known weaknesses of what is installed with pip-audit, and says so where nothing could be looked up.

An index that stands in for pypi.org may have no advisories: pip-audit then finds none in anything, and is content. So
it is asked about an old release first, of which several are known.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN = "jinja2==2.10"  # CVE-2019-10906 and others
SERVICES = ("pypi", "osv")


def knows(service: str) -> bool:
    """Whether a service of pip-audit's has advisories of the old release."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(KNOWN + "\n", encoding="utf-8")
        words = [
            "-r",
            str(listed),
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--vulnerability-service",
            service,
        ]
        done = subprocess.run([sys.executable, "-m", "pip_audit", *words], capture_output=True, text=True, check=False)
    try:
        return any(found.get("vulns") for found in json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError, AttributeError):  # it could not ask
        return False


def main() -> int:
    """pip-audit's status, 1 also if nobody could be asked."""
    service = next((name for name in SERVICES if knows(name)), None)
    if service is None:
        print(
            f"make audit: nothing was looked up: neither {' nor '.join(SERVICES)}, as reached from here, knows a "
            f"weakness of {KNOWN}, which has several; run it where pypi.org or osv.dev can be reached",
            file=sys.stderr,
        )
        return 1
    words = ["--skip-editable", "--vulnerability-service", service]
    return subprocess.run([sys.executable, "-m", "pip_audit", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
