"""Coarser meshes for the renderer alone.

A software renderer spends its time on vertices: a LIBERO frame has 250,000 to 415,000 triangles,
most of them far smaller than a pixel at 128 or 256 px. Here the vertices that fall into one cell of
a grid and face the same way become one vertex (vertex clustering, Rossignac and Borrel 1993; the
normals keep the two sides of a bowl's thin wall apart) and the triangles that collapse are dropped.
The arrays are put back once the rendering context has copied them, so that
physics never sees the change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIELDS = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")


def cluster_vertices(
    vertices: NDArray[np.float32], faces: NDArray[np.int32], cell: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Moves the vertices of each grid cell that face the same way to their mean.

    Args:
        vertices: `(V, 3)` in metres.
        faces: `(F, 3)` vertex indices.
        cell: Side of a grid cell in metres, above 0.

    Returns:
        New vertices `(V, 3)`, and which faces `(F,)` still have three different corners.
    """
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = np.stack(
        [
            np.bincount(faces.reshape(-1), np.repeat(normals[:, k], 3), len(vertices))
            for k in range(3)
        ],
        axis=1,
    )
    axis = np.abs(facing).argmax(axis=1)
    side = axis * 2 + (np.take_along_axis(facing, axis[:, None], 1)[:, 0] > 0)
    keys = np.column_stack([np.floor(vertices / cell).astype(np.int64), side])
    _, cluster = np.unique(keys, axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    count = np.bincount(cluster)[:, None]
    centre = np.stack([np.bincount(cluster, vertices[:, k]) for k in range(3)], axis=1) / count
    a, b, c = cluster[faces].T
    return centre[cluster].astype(np.float32), (a != b) & (b != c) & (c != a)


@contextlib.contextmanager
def simplified_meshes(model: Any, cell: float) -> Iterator[None]:
    """Simplifies the meshes of a `mujoco.MjModel` inside the block; `cell=0` changes nothing.

    Args:
        model: The model, whose mesh arrays are restored on exit.
        cell: Side of a grid cell in metres.
    """
    if cell <= 0:
        yield
        return
    saved = {name: getattr(model, name).copy() for name in _FIELDS}
    try:
        for mesh in range(model.nmesh):
            v0, nv = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            f0, nf = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
            faces = saved["mesh_face"][f0 : f0 + nf]
            vertices, keep = cluster_vertices(saved["mesh_vert"][v0 : v0 + nv], faces, cell)
            kept = int(keep.sum())
            if kept == 0:
                continue
            model.mesh_vert[v0 : v0 + nv] = vertices
            for name in ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"):
                getattr(model, name)[f0 : f0 + kept] = saved[name][f0 : f0 + nf][keep]
            model.mesh_facenum[mesh] = kept
        yield
    finally:
        for name, value in saved.items():
            getattr(model, name)[:] = value
