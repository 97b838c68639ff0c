"""Run `6 * 7` in a Hyperlight sandbox of the backend that is named on the command line, and print the result."""

import sys

from hyperlight_sandbox import Sandbox  # type: ignore[import-not-found]

SANDBOXES: dict[str, dict[str, str]] = {
    "js": {"backend": "hyperlight-js"},
    "wasm": {"backend": "wasm", "module": "javascript_guest.path"},
}
result = Sandbox(**SANDBOXES[sys.argv[1]]).run("console.log(6 * 7)")
print(result)
print("result", result.stdout.strip())
