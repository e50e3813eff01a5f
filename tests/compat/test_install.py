"""Where ``import deep_ep`` leads, and that it never leads away from a DeepEP that is installed."""

import os
import sys
import textwrap

import pytest

from tests.child import run_child


def run(program, path=None):
    env = {**os.environ} | ({} if path is None else {"PYTHONPATH": f"{path}:" + ":".join(sys.path)})
    done = run_child([sys.executable, "-c", textwrap.dedent(program)], env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_modules_are_found_by_their_names():
    assert (
        run("""
        import importlib.util, sys
        assert importlib.util.find_spec("deep_ep") is None
        from crossdock.compat import install
        module = install()
        assert install() is module
        import deep_ep, deep_ep_cpp, deep_ep.utils, deep_ep.comm
        from deep_ep.utils import EventHandle, EventOverlap
        from deep_ep.utils.event import EventOverlap as same
        from deep_ep.utils.math import align
        from deep_ep import Buffer, Config, ElasticBuffer, EPBuffer, EPHandle, topk_idx_t
        assert deep_ep is module and same is EventOverlap is deep_ep.EventOverlap
        assert deep_ep_cpp.Config is Config and deep_ep_cpp.EventHandle is EventHandle and deep_ep_cpp.Buffer
        assert deep_ep_cpp.is_sm90_compiled() and deep_ep_cpp.topk_idx_t is topk_idx_t
        hint = deep_ep_cpp.get_low_latency_rdma_size_hint(8, 128, 2, 4)
        assert hint == Buffer.get_low_latency_rdma_size_hint(8, 128, 2, 4)
        from deep_ep.buffer import Buffer as first
        from deep_ep.buffers.legacy import Buffer as second
        from deep_ep.buffers.elastic import ElasticBuffer as third, EPHandle
        import deep_ep.buffers.elastic
        from deep_ep.utils.comm import get_physical_domain_size
        assert first is second is deep_ep.buffers.Buffer is Buffer and third is deep_ep.buffers.elastic.ElasticBuffer
        for name in ("deep_ep", "deep_ep_cpp", "deep_ep.utils", "deep_ep.utils.envs"):
            assert importlib.util.find_spec(name) is not None, name
        assert "deep_ep_v2" not in sys.modules
        install(v2=True)
        from deep_ep_v2 import EPBuffer as other
        assert other is EPBuffer
        from deep_ep import _C
        import deep_ep._C
        assert _C is deep_ep_cpp
        print("done", "torch.utils.cpp_extension" in sys.modules, "triton" in sys.modules)
    """)[0]
        == "done"
    )


def test_importing_compat_installs_nothing():
    assert run("""
        import importlib.util
        import crossdock.compat
        print(importlib.util.find_spec("deep_ep"))
    """) == ["None"]


@pytest.mark.parametrize("is_imported", [False, True])
def test_an_installed_one_is_not_shadowed(tmp_path, is_imported):
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("is_real = True\n")
    said = run(
        f"""
        if {is_imported}:
            import deep_ep
        from crossdock import ConfigError
        from crossdock.compat import install
        try:
            install()
        except ConfigError as error:
            assert "replace=True" in str(error) and "deep_ep" in str(error)
        else:
            raise SystemExit("it was shadowed")
        import deep_ep
        assert deep_ep.is_real
        install(replace=True)
        import deep_ep
        print(hasattr(deep_ep, "is_real"))
        """,
        tmp_path,
    )
    assert said == ["False"]
