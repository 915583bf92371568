// A strict provider that none of us wrote: npm's oidc-provider, each refresh
// token good for one use, and a second use the end of all that came of the login.
// What differs from its defaults is below. It is told what it needs in one line of
// JSON on standard input, says where it listens, and ends when that input ends.
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import Provider from "oidc-provider";

const input = createInterface({ input: process.stdin });
input.on("close", () => process.exit());
input.once("line", (line) => serve(JSON.parse(line)));

function serve({ issuer, client, secret, redirect, scopes, life }) {
  const provider = new Provider(issuer, {
    clients: [{
      client_id: client,
      client_secret: secret,
      redirect_uris: [redirect],
      grant_types: ["authorization_code", "refresh_token"],
    }],
    rotateRefreshToken: true,
    scopes: ["openid", "offline_access", ...scopes],
    claims: { openid: ["sub", "roles"] },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, roles: ["researcher"] }) }),
    features: { revocation: { enabled: true } },
    ttl: { AccessToken: life, Grant: 86400, IdToken: 3600, Interaction: 600, RefreshToken: 86400, Session: 86400 },
    cookies: { keys: [secret] },
  });
  const server = createServer(provider.callback());
  server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
}
