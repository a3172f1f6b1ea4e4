/**
 * A real OpenID provider for tests: oidc-provider over TLS, with the keys, clients and users of its settings (JSON).
 *
 * POST /keys replaces its keys while it runs.
 */

import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';

import { Provider } from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const { issuer, port, certificate, key } = settings;
const groups = settings.groups;

function create(jwks) {
  const provider = new Provider(issuer, {
    clients: settings.clients,
    jwks,
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      deviceFlow: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => 'urn:pool',
        useGrantedResource: () => true,
        getResourceServerInfo: (_, resource) => ({
          scope: 'openid offline_access',
          audience: resource === 'urn:pool' ? 'gpupool' : 'another service',
          accessTokenTTL: settings.ttl_s,
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: 'RS256' } }
        })
      }
    },
    extraTokenClaims: (_, token) => ({ groups: groups[token.accountId ?? token.clientId] ?? [] }),
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
    // Nobody is asked for consent.
    loadExistingGrant: async ctx => {
      const grant = new ctx.oidc.provider.Grant({
        accountId: ctx.oidc.session.accountId,
        clientId: ctx.oidc.client.clientId
      });
      grant.addOIDCScope('openid offline_access');
      grant.addResourceScope('urn:pool', 'openid offline_access');
      await grant.save();
      return grant;
    },
    issueRefreshToken: () => true,
    interactions: { url: (_, interaction) => `/login/${interaction.uid}` },
    cookies: { keys: ['of a test'] },
    ttl: { ClientCredentials: settings.ttl_s, AccessToken: settings.ttl_s }
  });
  provider.on('server_error', (_, error) => console.error(error));
  return provider;
}

let provider = create(settings.jwks);

async function read(request) {
  let text = '';
  for await (const part of request) {
    text += part;
  }
  return text;
}

createServer({ key: readFileSync(key), cert: readFileSync(certificate) }, async (request, response) => {
  const path = new URL(request.url, issuer).pathname;
  if (path === '/keys') {
    provider = create(JSON.parse(await read(request)));
    response.end('done');
  } else if (path.startsWith('/login/') && request.method === 'GET') {
    response.setHeader('Content-Type', 'text/html');
    response.end('<form method="post"><label>User <input name="user" autofocus></label><button>Sign in</button></form>');
  } else if (path.startsWith('/login/')) {
    const accountId = new URLSearchParams(await read(request)).get('user');
    await provider.interactionFinished(request, response, { login: { accountId }, consent: {} });
  } else {
    provider.callback()(request, response);
  }
}).listen(port, '127.0.0.1', () => console.log('listening'));
