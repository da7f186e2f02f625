"""What surrounds the loop of a run: data order, folder, log, plan, stops."""
