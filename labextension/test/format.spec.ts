import { placed } from '../src/common/format';
import { IPiece } from '../src/pool/apitypes';
import { english as trans } from './english';

function piece(server: string, index: number, memory_mib = 16255): IPiece {
  return { gpu_uuid: '', server, index, name: '', memory_mib, total_mib: 32510, emulated: true };
}

describe('where a lease is', () => {
  it('is told by server, and by size', () => {
    expect(placed([piece('vm', 0), piece('vm', 1)], trans)).toBe('2 × 16,255 MiB: GPU 0, 1 of vm');
    expect(placed([piece('a', 0), piece('b', 0), piece('b', 1)], trans)).toBe(
      '1 × 16,255 MiB: GPU 0 of a · 2 × 16,255 MiB: GPU 0, 1 of b'
    );
    expect(placed([piece('a', 0), piece('a', 1, 100)], trans)).toBe(
      '1 × 16,255 MiB: GPU 0 of a · 1 × 100 MiB: GPU 1 of a'
    );
  });
});
