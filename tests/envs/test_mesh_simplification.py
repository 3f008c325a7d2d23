"""Vertex clustering and its effect on a model's mesh arrays, without a simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from wmgym.envs.mesh_simplification import cluster_vertices, simplified_meshes

FIELDS = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")


def sheet(n, height=0.0, upwards=True):
    """A unit square of `n x n` vertices and `2 (n - 1)^2` triangles that all face one way."""
    x, y = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
    vertices = np.stack([x, y, np.full_like(x, height)], -1).reshape(-1, 3).astype(np.float32)
    i = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).reshape(-1)
    faces = np.concatenate([np.stack([i, i + n, i + 1], 1), np.stack([i + n, i + n + 1, i + 1], 1)])
    return vertices, (faces if upwards else faces[:, ::-1]).astype(np.int32)


def model_of(*meshes):
    counts = [(len(vertices), len(faces)) for vertices, faces in meshes]
    starts = np.cumsum([(0, 0), *counts], 0)
    faces = np.concatenate([faces for _, faces in meshes])
    return SimpleNamespace(
        nmesh=len(meshes),
        mesh_vert=np.concatenate([vertices for vertices, _ in meshes]),
        mesh_face=faces,
        mesh_facenormal=faces + 1000,
        mesh_facetexcoord=faces + 2000,
        mesh_vertadr=starts[:-1, 0],
        mesh_vertnum=np.array([count[0] for count in counts]),
        mesh_faceadr=starts[:-1, 1],
        mesh_facenum=np.array([count[1] for count in counts]),
    )


def arrays_of(model):
    return {name: getattr(model, name).copy() for name in FIELDS}


def assert_same_arrays(model, before):
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(model, name), value, err_msg=name)


def test_vertices_of_a_cell_move_to_their_mean():
    vertices, faces = sheet(4)  # 0, 1/3, 2/3, 1 in cells of 0.5: two by two corners, two left over
    moved, _ = cluster_vertices(vertices, faces, 0.5)
    expected = np.array([1 / 6, 1 / 6, 2 / 3, 1.0], np.float32)  # 1.0 begins a cell of its own
    np.testing.assert_allclose(moved.reshape(4, 4, 3)[:, 0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(moved.reshape(4, 4, 3)[0, :, 1], expected, atol=1e-6)


@pytest.mark.parametrize("cell", [0.05, 0.2, 0.7])
def test_no_vertex_leaves_its_cell_and_kept_faces_have_an_area(cell):
    vertices, faces = sheet(21)
    vertices[:, 2] = 0.1 * np.sin(9 * vertices[:, 0])
    moved, keep = cluster_vertices(vertices, faces, cell)
    assert np.abs(moved - vertices).max() <= cell
    corners = moved[faces]
    distances = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1).min(1)
    assert (distances[keep] > 0).all()
    assert (distances[~keep] == 0).all()


def test_a_fine_grid_changes_nothing_and_a_coarser_one_keeps_fewer_faces():
    vertices, faces = sheet(21)
    moved, keep = cluster_vertices(vertices, faces, 0.01)
    np.testing.assert_array_equal(moved, vertices)
    assert keep.all()
    kept = [cluster_vertices(vertices, faces, cell)[1].sum() for cell in (0.01, 0.09, 0.2, 2.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0


def test_the_two_sides_of_a_thin_wall_stay_apart():
    top, top_faces = sheet(9, height=0.012)
    bottom, bottom_faces = sheet(9, height=0.01, upwards=False)
    vertices = np.concatenate([top, bottom])
    faces = np.concatenate([top_faces, bottom_faces + len(top)])
    moved, keep = cluster_vertices(vertices, faces, 0.3)
    assert 0 < keep.sum() < len(faces)
    np.testing.assert_array_equal(moved[:, 2], vertices[:, 2])


def test_arrays_are_simplified_inside_and_restored_after():
    model = model_of(sheet(11), sheet(21))
    before = arrays_of(model)
    with simplified_meshes(model, 0.3):
        assert (model.mesh_facenum < before["mesh_facenum"]).all()
        for mesh in range(2):
            first, kept = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
            now = slice(first, first + kept)
            original = before["mesh_face"][first : first + before["mesh_facenum"][mesh]].tolist()
            assert all(face in original for face in model.mesh_face[now].tolist())
            np.testing.assert_array_equal(model.mesh_facenormal[now], model.mesh_face[now] + 1000)
            np.testing.assert_array_equal(model.mesh_facetexcoord[now], model.mesh_face[now] + 2000)
    assert_same_arrays(model, before)


def test_arrays_are_restored_after_an_error():
    model = model_of(sheet(11))
    before = arrays_of(model)

    def upload():
        with simplified_meshes(model, 0.3):
            assert model.mesh_facenum[0] < before["mesh_facenum"][0]
            raise RuntimeError("no context")

    with pytest.raises(RuntimeError, match="no context"):
        upload()
    assert_same_arrays(model, before)


def test_a_mesh_smaller_than_a_cell_is_left_alone():
    small, faces = sheet(5)
    model = model_of(sheet(11), (small * 0.01 + np.float32(0.1), faces))
    before = arrays_of(model)
    with simplified_meshes(model, 0.3):
        assert model.mesh_facenum[0] < before["mesh_facenum"][0]
        assert model.mesh_facenum[1] == before["mesh_facenum"][1]
        np.testing.assert_array_equal(model.mesh_vert[-25:], before["mesh_vert"][-25:])


def test_cell_zero_changes_nothing():
    model = model_of(sheet(11))
    before = arrays_of(model)
    with simplified_meshes(model, 0.0):
        assert_same_arrays(model, before)
