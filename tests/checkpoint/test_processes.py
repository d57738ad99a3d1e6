"""Two processes save, restore and fall back together; one process reads what they wrote."""

from pathlib import Path

from processes import run_processes
from small import abstract, equal, mesh_of, new_state

from jaxgen.checkpoint.manager import CheckpointManager

SCRIPT = """
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from small import abstract, equal, mesh_of, new_state
    from jaxgen.checkpoint.manager import CheckpointConfig, CheckpointManager
    from jaxgen.errors import UserError

    def same(tree, other):
        flags = jax.tree.map(lambda a, b: (a == b).all(), tree, other)
        return all(bool(flag.addressable_shards[0].data) for flag in jax.tree.leaves(flags))

    folder = Path(sys.argv[1])
    mesh, other = mesh_of(fsdp=4), mesh_of(fsdp=2, tensor=2)
    states = {step: jax.block_until_ready(new_state(mesh, seed=step)) for step in (1, 2, 3)}
    with CheckpointManager(folder, CheckpointConfig(keep_last=2)) as manager:
        for step, state in states.items():
            manager.save(step, state, {"data": step})
    distributed.barrier("saved", 60)
    if me == 0:
        (path,) = (folder / "00000003" / "model" / "ocdbt.process_1" / "d").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
    with CheckpointManager(folder) as manager:
        print("steps", manager.all_steps())
        state, step, metadata = manager.restore(abstract(other))
        with jax.set_mesh(other):
            print("restored", step, metadata, same(state, new_state(other, seed=2)))
        try:
            manager.restore(abstract(other), step=3)
        except UserError as error:
            print("refused", "has" in str(error))
        if not manager.save(2, state, {}):
            print("not again")
    distributed.barrier("end", 60)
    """


def test_two_processes(tmp_path):
    outputs = run_processes(SCRIPT, str(tmp_path), str(Path(__file__).parent))
    for output in outputs:
        assert "steps [2, 3]" in output
        assert "restored 2 {'data': 2} True" in output
        assert "refused True" in output
        assert "not again" in output
    alone = mesh_of(data=4, tensor=2)
    restored = CheckpointManager(tmp_path).restore(abstract(alone))
    assert restored.step == 2
    assert equal(restored.state, new_state(alone, seed=2))
