"""Controls: pictures held against maps, edges, depth or a face; several methods scored while they train."""
