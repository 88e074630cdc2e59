#!/bin/bash
# launchd's job of the endpoint: waits for the rack, ends what a killed predecessor left, and becomes `pomarium serve`.
#
#   deploy/launchd/serve.sh POMARIUM ARGUMENT ...
set -euo pipefail

readonly pomarium=$1 key_file="$HOME/.config/pomarium/api.key"

end_left_over() ( # an endpoint outlives a `pomarium serve` that was killed, and holds its port
    eval "$("$pomarium" rack env)"
    "${pomarium%/*}/python" -m ray.serve.scripts shutdown -y --address "$RAY_API_SERVER_ADDRESS"
)

# Without a rack it would serve from this Mac alone.
until "$pomarium" rack env >/dev/null 2>&1; do sleep 5; done
end_left_over || echo "what is left of an endpoint, if anything, could not be ended"
if [ -r "$key_file" ]; then
    POMARIUM_API_KEY=$(cat "$key_file")
    export POMARIUM_API_KEY
fi
# It watches the process that this one becomes; as that process's parent it would stand between it and launchd.
/usr/bin/caffeinate -i -s -w $$ &
exec "$@"
