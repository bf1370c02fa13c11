"""A real gateway: the LiteLLM proxy on loopback in front of the test endpoint serves a run. ``make test-gateway``.

Not part of ``make test``: it installs the proxy into a virtual environment of its own, whose ``bin`` is in GATEWAY_BIN.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import RunningEndpoint
from llm_endpoint import KEY, MODEL
from test_teachers import embedded, error_line, figures, records, run  # noqa: F401 (fixtures)

MASTER_KEY = "sk-master-key-of-the-gateway-1234"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """The proxy in front of an endpoint: (its address, the endpoint)."""
    folder, endpoint = tmp_path_factory.mktemp("gateway"), RunningEndpoint("--faults", 0.05)
    settings = {
        "model_list": [
            {
                "model_name": "judge-behind-the-gateway",
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{endpoint.url}/v1", "api_key": KEY},
            }
        ],
        "general_settings": {"master_key": MASTER_KEY},
        "litellm_settings": {"num_retries": 0},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    litellm = Path(os.environ["GATEWAY_BIN"]).resolve() / "litellm"
    command = [str(litellm), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    log = open(folder / "log", "w")  # noqa: SIM115
    proxy = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        assert proxy.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health/liveliness")
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    yield address, endpoint
    proxy.terminate()
    proxy.wait()
    endpoint.close()


def test_a_run_through_the_gateway(run, gateway, embedded):  # noqa: F811
    address, endpoint = gateway
    env = {"BASE_URL": address, "API_KEY": MASTER_KEY}
    model = "LiteLLM/judge-behind-the-gateway"
    flags = ["--reranker_model", model, "--hyde_model", model]
    run(endpoint, *flags, env=env, name="gateway")
    run(endpoint, "--hyde_model", MODEL, "--cache_dir", run.cache.parent / "direct", name="direct")
    config = json.loads((run.output / "gateway" / "config.json").read_text())
    assert config["teacher"] | {"identity": None} == {"name": model, "score_mode": "yes_no", "identity": None}
    assert len(records(run.cache)) >= 120 and len(records(run.cache, "passage")) == 6
    scores = [figures(run.output / name)["embeddings"]["reranker_score"] for name in ("gateway", "direct")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    usage = json.loads((run.output / "gateway" / "summary.json").read_text())["language_models"]
    print(f"\nthrough the gateway: {usage}")


@pytest.mark.parametrize(
    ("env", "model", "said"),
    [
        ({"API_KEY": "sk-wrong-key-1234567890"}, "judge-behind-the-gateway", "refuses the key in API_KEY"),
        ({}, "no-such-model", "no-such-model"),
    ],
)
def test_the_gateways_refusals_are_one_line(run, gateway, env, model, said):  # noqa: F811
    address, endpoint = gateway
    env = {"BASE_URL": f"{address}/v1", "API_KEY": MASTER_KEY, **env}
    line = error_line(run(endpoint, "--reranker_model", f"LiteLLM/{model}", env=env, check=False), 2)
    assert said in line and "sk-wrong-key-1234567890" not in line
    print(f"\n{line}")
