"""A program with one mistake on each marked line, which a type checker must find if it sees the package's types."""

import crossdock as cd

spec = cd.Spec(num_experts="8", num_topk=2, hidden=4, max_tokens=3)  # mistake
cd.Buffer(None, spec, mover="aeroplane")  # mistake
cd.Buffer(None, spec).dispatch()  # mistake
