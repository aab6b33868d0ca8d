"""The secure sum: vectors of sites are added such that the server learns the total alone.

    ring.py         numbers as integers modulo 2^b
    context.py      which run a message belongs to, and the rules of a site
    site.py         SiteSums, a site's side: keys, shares, masks, agreement, reveal
    server.py       ServerSums, the server's side of one stage of one round
    roster.py       the participants of a stage with their keys, and who holds whose shares
    graph.py        who is whose neighbour
    shamir.py       secrets that t of their holders open together
    masks.py        seeds as streams of random numbers, added to vectors
    primitives.py   keys, derivation and encryption, by the package `cryptography`
    messages.py     what travels
    vectors.py      the update of a model as vectors, and their mean
    totals.py       the values of a call of `fl_adapters.sums`

It knows no transport: the caller carries the messages. Sources: Bonawitz et al. 2017, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning" (masks, shares, consistency check); Bell et al. 2020, "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead" (sparse graph).

One stage of one round, with u and v for sites:

1. Each site makes keys for the run, an X25519 and an Ed25519 pair, and signs them with its certificate (`public`).
2. `begin`, or `begin_next` in the round before: u draws two seeds, b_u and K_u. The seed of a pair of neighbours comes
   from their X25519 keys and the stage. K_u encrypts the list of u's pair seeds, for the server to store. b_u and K_u
   are shared among u's holders, which are its neighbours and itself; t of them are needed to open one. Each share is
   encrypted for its holder.
3. `mask`: u adds the streams of b_u and of its pair seeds to its vectors; the smaller name of a pair adds, the larger
   one subtracts, so that pair masks cancel in the sum.
4. `agree`: u signs who the survivors are, those whose vectors have arrived. Below 32 sites this step is left out if
   nobody drops out: with its vector, u has signed that all survive (`sign_all`).
5. `reveal`: when t of u's holders have signed the same, u reveals its shares of b_v for each survivor v, or of K_v for
   each site v that has dropped out. Never both.
6. The server removes the masks that have not cancelled.
"""

from fl_runtime.secure_sum.context import Context, Signer, SumRules, Verifier
from fl_runtime.secure_sum.ring import Ring, count_beyond
from fl_runtime.secure_sum.server import ServerSums
from fl_runtime.secure_sum.site import SiteSums

__all__ = ["Context", "Ring", "ServerSums", "Signer", "SiteSums", "SumRules", "Verifier", "count_beyond"]
