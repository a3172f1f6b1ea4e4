import { Feed, SILENCE_MS } from '../src/pool/feed';
import { Message } from '../src/pool/apitypes';
import { delta, whole } from './pool';

/** The server's end of a connection. */
class Line {
  constructor(readonly query: string) {}
  onmessage: (event: { data: string }) => void = () => undefined;
  onclose: (event: { reason: string }) => void = () => undefined;
  closed = false;
  close(): void {
    this.closed = true;
  }
  say(message: Message | string): void {
    const data = typeof message === 'string' ? message : JSON.stringify(message);
    this.onmessage({ data });
  }
  break(reason = ''): void {
    this.onclose({ reason });
  }
}

function setUp(why = '') {
  const lines: Line[] = [];
  const feed: Feed = new Feed({
    connect: query => {
      lines.push(new Line(query));
      return lines[lines.length - 1] as unknown as WebSocket;
    },
    why: async () => why,
    onChange: () => undefined
  });
  /** The nth connection that was made. */
  const line = (n: number): Line => {
    const made = lines[n];
    if (!made) {
      throw new Error(`only ${lines.length} connections were made`);
    }
    return made;
  };
  return { feed, lines, line };
}

beforeEach(() => jest.useFakeTimers());
afterEach(() => jest.useRealTimers());

it('is live from the first message', () => {
  const { feed, line } = setUp();
  feed.start();
  expect(feed.connection.status).toBe('connecting');
  expect(line(0).query).toBe('');
  line(0).say(whole());
  expect(feed.connection.status).toBe('live');
  expect(feed.state?.seq).toBe(0);
});

it('says that it is lost, and goes on where it was', () => {
  const { feed, line } = setUp();
  feed.start();
  line(0).say(whole());
  line(0).say(delta(1));
  line(0).break('the pool is restarting');
  expect(feed.connection).toMatchObject({ status: 'lost', reason: 'the pool is restarting' });
  expect(feed.state?.seq).toBe(1); // to be shown as what it is: old
  jest.advanceTimersByTime(1000);
  expect(line(1).query).toBe('?feed=f&seq=1');
  line(1).say({ type: 'resumed', feed: 'f', seq: 1, at: 1 });
  line(1).say(delta(2));
  expect(feed.connection.status).toBe('live');
  expect(feed.state?.seq).toBe(2);
});

it('is lost when the pool falls silent', () => {
  const { feed, line } = setUp();
  feed.start();
  line(0).say(whole());
  jest.advanceTimersByTime(SILENCE_MS + 1);
  expect(feed.connection.status).toBe('lost');
  expect(line(0).closed).toBe(true);
  line(0).say(delta(1));
  expect(feed.state?.seq).toBe(0); // nobody listens on the old line
});

it('tries again, later and later, never later than a quarter of a minute or so', () => {
  const { feed, lines, line } = setUp();
  feed.start();
  const pauses: number[] = [];
  for (let round = 0; round < 12; round++) {
    line(lines.length - 1).break();
    const pause = feed.connection.retryAt - Date.now();
    pauses.push(pause);
    jest.advanceTimersByTime(pause + 1);
  }
  expect(lines).toHaveLength(13);
  expect(pauses[0]).toBeLessThan(1000);
  expect(Math.max(...pauses)).toBeLessThan(20000);
  expect(pauses[11]).toBeGreaterThan(pauses[0] ?? Infinity);
});

it('asks for everything when a message does not follow', () => {
  const { feed, line } = setUp();
  feed.start();
  line(0).say(whole());
  line(0).say(delta(5));
  expect(line(0).closed).toBe(true);
  expect(line(1).query).toBe('');
  line(1).say('no JSON');
  expect(line(2).query).toBe('');
});

it('asks why, where a socket did not say', async () => {
  const { feed, line } = setUp('the ledger cannot be read');
  feed.start();
  line(0).break();
  await jest.advanceTimersByTimeAsync(0);
  expect(feed.connection.reason).toBe('the ledger cannot be read');
});

it('tries at once when it is told to', () => {
  const { feed, lines, line } = setUp();
  feed.start();
  line(0).break();
  feed.retry();
  expect(lines).toHaveLength(2);
  jest.advanceTimersByTime(SILENCE_MS - 1);
  expect(lines).toHaveLength(2); // the timer of the first try is gone
});

it('rests while nobody wants it, and leaves no timer', () => {
  const { feed, line } = setUp();
  feed.start();
  line(0).say(whole());
  feed.stop();
  expect(feed.connection.status).toBe('off');
  expect(line(0).closed).toBe(true);
  expect(jest.getTimerCount()).toBe(0);
  line(0).break();
  expect(jest.getTimerCount()).toBe(0);
  feed.start();
  expect(line(1).query).toBe('?feed=f&seq=0');
});
