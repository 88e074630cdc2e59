#!/bin/sh
# Runs a command in a network as a Mac's: of the loopback addresses 127.0.0.1 alone, and one Ethernet, 192.168.77.2.
#
#   tests/mac_network.sh COMMAND [ARGUMENT ...]
#
# Needs Linux, root and iproute2. The network is a namespace that ends with the command; nobody else is in it.
set -eu
if [ "${MAC_NETWORK:-}" != 1 ]; then
    MAC_NETWORK=1 exec unshare --net "$0" "$@"
fi
ip link set lo up
ip address delete 127.0.0.1/8 dev lo
ip address add 127.0.0.1/32 dev lo
ip link add en0 type veth peer name switch0
ip address add 192.168.77.2/24 broadcast + dev en0
ip link set en0 up
ip link set switch0 up
ip route add default via 192.168.77.1
unset MAC_NETWORK
exec "$@"
