"""The objective axis: is it the same function? One job a file; `pipeline.check` puts them together."""
